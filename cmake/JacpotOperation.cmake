# jacpot_add_operation(NAME [SOURCES ...] [ISA_SOURCES ...] [CUDA_SOURCES ...])
#
# SOURCES are compiled once. ISA_SOURCES are compiled once per instruction set, with JACPOT_ISA
# naming it (a namespace of the same name keeps the copies apart). CUDA_SOURCES need nvcc.
# The objects end up in the extension module.

define_property(GLOBAL PROPERTY JACPOT_OBJECT_TARGETS BRIEF_DOCS "Object libraries of the extension"
                FULL_DOCS "Object libraries linked into the extension module")

function(jacpot_object_library target)
  add_library(${target} OBJECT ${ARGN})
  target_link_libraries(${target} PRIVATE jacpot_flags)
  set_property(GLOBAL APPEND PROPERTY JACPOT_OBJECT_TARGETS ${target})
endfunction()

# The same CUDA sources compiled as C++, for the tests' emulator: see common/cuda_emulator.hpp.
function(jacpot_emulated_library target)
  set_source_files_properties(${ARGN} PROPERTIES LANGUAGE CXX)
  add_library(${target} OBJECT EXCLUDE_FROM_ALL ${ARGN})
  target_link_libraries(${target} PRIVATE jacpot_flags)
  target_compile_definitions(${target} PRIVATE JACPOT_CUDA_EMULATOR)
  target_compile_options(${target} PRIVATE -Wno-unknown-pragmas)
  set_property(GLOBAL APPEND PROPERTY JACPOT_EMULATED_TARGETS ${target})
endfunction()

function(jacpot_add_operation name)
  cmake_parse_arguments(arg "" "" "SOURCES;ISA_SOURCES;CUDA_SOURCES" ${ARGN})
  if(arg_SOURCES)
    jacpot_object_library(jacpot_${name} ${arg_SOURCES})
    if(JACPOT_WITH_CUDA)
      target_compile_definitions(jacpot_${name} PRIVATE JACPOT_WITH_CUDA)
    endif()
  endif()
  if(arg_ISA_SOURCES)
    foreach(isa IN LISTS JACPOT_ISAS)
      jacpot_object_library(jacpot_${name}_${isa} ${arg_ISA_SOURCES})
      target_compile_options(jacpot_${name}_${isa} PRIVATE ${JACPOT_FLAGS_${isa}})
      target_compile_definitions(jacpot_${name}_${isa} PRIVATE
        JACPOT_ISA=${isa} JACPOT_VECTOR_BYTES=${JACPOT_VECTOR_BYTES_${isa}})
    endforeach()
  endif()
  if(JACPOT_WITH_CUDA AND arg_CUDA_SOURCES)
    jacpot_object_library(jacpot_${name}_cuda ${arg_CUDA_SOURCES})
  endif()
  if(JACPOT_CUDA_EMULATOR AND arg_CUDA_SOURCES)
    jacpot_emulated_library(jacpot_${name}_emulated ${arg_CUDA_SOURCES})
  endif()
endfunction()
