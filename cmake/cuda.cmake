# libfastok_cuda: the CUDA backend, loaded by fastok where torch sees a GPU. Its undefined symbols (torch's CUDA half)
# resolve against the torch that Python loaded.
set(CMAKE_CUDA_ARCHITECTURES ${FASTOK_CUDA_ARCHS})
enable_language(CUDA)

set(CMAKE_CUDA_VISIBILITY_PRESET hidden)

add_library(fastok_cuda SHARED csrc/attention/attention_cuda.cu csrc/attention/attention_bf16.cu
            csrc/attention/attention_f16.cu csrc/attention/attention_f32.cu csrc/attention/backward_cuda.cu
            csrc/attention/backward_bf16.cu csrc/attention/backward_f16.cu csrc/attention/backward_f32.cu
            csrc/k_center/k_center_cuda.cu csrc/match/match_cuda.cu csrc/max_coverage/max_coverage_cuda.cu
            csrc/merge/merge_cuda.cu csrc/select/select_cuda.cu csrc/sparse/sparse_cuda.cu csrc/decode/decode_cuda.cu
            csrc/decode/packed_cuda.cu csrc/quantize/kv_format.cpp csrc/quantize/quantize_cuda.cu)
set_target_properties(fastok_cuda PROPERTIES CUDA_RUNTIME_LIBRARY Static)
target_link_libraries(fastok_cuda PRIVATE fastok_torch)
# Python loads torch's libraries privately, so that fastok_cuda must name the one its CUDA symbols come from. A torch for
# CPUs, which it may be built beside, lacks it: what is linked is an empty library of that name.
file(WRITE ${CMAKE_BINARY_DIR}/empty.cpp "")
add_library(torch_cuda SHARED ${CMAKE_BINARY_DIR}/empty.cpp)
set_target_properties(torch_cuda PROPERTIES LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/stub)
target_link_libraries(fastok_cuda PRIVATE -Wl,--push-state,--no-as-needed torch_cuda -Wl,--pop-state)
target_compile_definitions(fastok_cuda PRIVATE USE_CUDA)  # shows the stable ABI's CUDA half
set(cuda_targets fastok_cuda)

# Hopper's own kernels, each element type and width in a file of its own. FASTOK_SM90=ON: not without them.
set(FASTOK_SM90 "AUTO" CACHE STRING "Hopper's kernels: AUTO (if 90a is built for and CUTLASS is found), ON or OFF")
if(FASTOK_SM90 AND "90a" IN_LIST FASTOK_CUDA_ARCHS)
  include(third_party/cutlass.cmake)
endif()
if(FASTOK_SM90 AND CUTLASS_INCLUDE_DIR)
  add_library(fastok_sm90 OBJECT)
  foreach(FASTOK_TYPE f16 bf16)
    foreach(FASTOK_WIDTH 64 128)
      set(instance ${CMAKE_BINARY_DIR}/sm90/attention_${FASTOK_TYPE}_${FASTOK_WIDTH}.cu)
      configure_file(csrc/attention/attention_sm90.cu.in ${instance} @ONLY)
      target_sources(fastok_sm90 PRIVATE ${instance})
    endforeach()
  endforeach()
  set_target_properties(fastok_sm90 PROPERTIES CUDA_ARCHITECTURES 90a)
  target_include_directories(fastok_sm90 PRIVATE csrc)
  target_include_directories(fastok_sm90 SYSTEM PRIVATE ${CUTLASS_INCLUDE_DIR})
  target_sources(fastok_cuda PRIVATE $<TARGET_OBJECTS:fastok_sm90>)
  target_compile_definitions(fastok_cuda PRIVATE FASTOK_SM90)
  list(APPEND cuda_targets fastok_sm90)
elseif(FASTOK_SM90 STREQUAL "ON")
  message(FATAL_ERROR "FASTOK_SM90=ON needs 90a among FASTOK_CUDA_ARCHS (${FASTOK_CUDA_ARCHS}), and CUTLASS: see third_party")
else()
  message(STATUS "libfastok_cuda is built without Hopper's kernels: see third_party")
endif()

string(REPLACE ";" "," host_warnings "${warnings}")
string(REPLACE ";" "," host_reproducible "${reproducible}")
foreach(target IN LISTS cuda_targets)
  # CMake 3.25.1 does not know that nvcc 13 has C++20: its own way of asking, taken over from C++, is switched off.
  set_target_properties(${target} PROPERTIES CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED OFF)
  target_compile_options(${target} PRIVATE -std=c++20 "$<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=${host_warnings}>"
                         "$<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=${host_reproducible}>"
                         "$<$<COMPILE_LANGUAGE:CXX>:${warnings};${reproducible}>")
  if(FASTOK_WERROR)
    target_compile_options(${target} PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:-Werror=all-warnings>")
  endif()
endforeach()

install(TARGETS fastok_cuda LIBRARY DESTINATION .)
