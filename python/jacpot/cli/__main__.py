"""``python -m jacpot.cli``."""

from jacpot.cli import main

if __name__ == "__main__":
    main()
