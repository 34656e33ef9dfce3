# The module _cuda. Whether it is wanted (SPARSEOPT_CUDA) is for the including file to know.
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  find_program(SPARSEOPT_NVCC nvcc NO_CMAKE_SYSTEM_PATH)
  if(DEFINED ENV{CUDACXX})
    leave_out("CUDA backend" "the CUDA compiler $ENV{CUDACXX} (CUDACXX) does not work")
  elseif(SPARSEOPT_NVCC)
    leave_out("CUDA backend" "the CUDA compiler ${SPARSEOPT_NVCC} does not work")
  elseif(SPARSEOPT_CUDA STREQUAL ON)
    leave_out("CUDA backend" "no nvcc was found")
  endif()
  return()
endif()

# To enable the language is an error where the compiler knows none of the architectures below.
execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --version OUTPUT_VARIABLE nvcc_version ERROR_QUIET)
if(nvcc_version MATCHES "release ([0-9.]+)" AND CMAKE_MATCH_1 VERSION_LESS 11.8)
  leave_out("CUDA backend" "nvcc ${CMAKE_MATCH_1} is older than 11.8")
  return()
endif()

# Code for three generations, and PTX that any later GPU can translate.
if(DEFINED CMAKE_CUDA_ARCHITECTURES OR DEFINED ENV{CUDAARCHS})
  enable_language(CUDA)
else()
  set(CMAKE_CUDA_ARCHITECTURES 80-real 90-real 80-virtual)
  enable_language(CUDA)
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.8)
    list(INSERT CMAKE_CUDA_ARCHITECTURES 2 100-real)
  endif()
endif()

# For build_info(): the numbers of the architectures that there is machine code for, and PTX.
if(NOT CMAKE_CUDA_ARCHITECTURES MATCHES "^[0-9]")
  message(FATAL_ERROR "CUDA architectures are \"${CMAKE_CUDA_ARCHITECTURES}\", they must be numbers such as 90")
endif()
set(machine_code ${CMAKE_CUDA_ARCHITECTURES})
list(FILTER machine_code EXCLUDE REGEX "-virtual$")
set(ptx ${CMAKE_CUDA_ARCHITECTURES})
list(FILTER ptx EXCLUDE REGEX "-real$")
foreach(list IN ITEMS machine_code ptx)
  list(TRANSFORM ${list} REPLACE "^([0-9]+).*" "\\1")
  list(JOIN ${list} "," ${list})
endforeach()

set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
set(sources ../python/cuda_module.cpp driver.cu lists.cu masked_step.cu sector_squares.cu sector_step.cu)
list(TRANSFORM sources PREPEND "${CMAKE_CURRENT_LIST_DIR}/")
# Without link-time optimisation, which pybind11 would turn on: it does not mix with nvcc's objects.
pybind11_add_module(_cuda MODULE NO_EXTRAS ${sources})
set_target_properties(_cuda PROPERTIES CUDA_RUNTIME_LIBRARY Static)
# As for the CPU: rounding is decided in update_rule.h.
target_compile_options(_cuda PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:-O3;-fmad=false;-Xcompiler=-Wall,-Wextra>")
set_source_files_properties(
  ${CMAKE_CURRENT_LIST_DIR}/../python/cuda_module.cpp
  PROPERTIES COMPILE_DEFINITIONS
             "SPARSEOPT_CUDA_VERSION=\"${CMAKE_CUDA_COMPILER_VERSION}\";SPARSEOPT_CUDA_ARCHITECTURES=${machine_code};SPARSEOPT_CUDA_PTX=${ptx}")
