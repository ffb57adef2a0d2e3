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
endfunction()
