# Flags that every target shares, and the instruction sets that hot code is built for.

add_library(jacpot_flags INTERFACE)
target_include_directories(jacpot_flags INTERFACE "${PROJECT_SOURCE_DIR}/csrc")
# Contraction to FMA is off by default in strict ISO mode, and the kernels are counted in FMAs.
target_compile_options(jacpot_flags INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Wshadow -Wno-psabi -ffp-contract=fast>)
if(JACPOT_WERROR)
  target_compile_options(jacpot_flags INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Werror>)
endif()
if(JACPOT_SANITIZE)
  set(sanitize -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer)
  target_compile_options(jacpot_flags INTERFACE $<$<COMPILE_LANGUAGE:CXX>:${sanitize}>)
  target_link_options(jacpot_flags INTERFACE ${sanitize})
endif()

# One wheel runs everywhere fast: each hot body is compiled once per entry and picked at run time.
set(JACPOT_ISAS baseline)
set(JACPOT_VECTOR_BYTES_baseline 16)
set(JACPOT_FLAGS_baseline "")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  list(APPEND JACPOT_ISAS avx2 avx512)
  set(JACPOT_VECTOR_BYTES_avx2 32)
  set(JACPOT_FLAGS_avx2 -mavx2 -mfma -mf16c -mbmi2)
  set(JACPOT_VECTOR_BYTES_avx512 64)
  set(JACPOT_FLAGS_avx512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mbmi2
                          -mprefer-vector-width=512)
endif()
