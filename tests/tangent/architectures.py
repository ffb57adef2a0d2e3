"""Networks as people write them, a few units wide: what they are made of, not what they learn."""

import image_architectures  # noqa: F401
import sequence_architectures  # noqa: F401
import unusual_architectures  # noqa: F401
from architecture_parts import ARCHITECTURES, build

__all__ = ["ARCHITECTURES", "build"]
