# libfastok_cuda: the CUDA backend, loaded by fastok where torch sees a GPU. Its undefined symbols (torch's CUDA half)
# resolve against the torch that Python loaded.
set(CMAKE_CUDA_ARCHITECTURES ${FASTOK_CUDA_ARCHS})
enable_language(CUDA)

set(CMAKE_CUDA_VISIBILITY_PRESET hidden)

add_library(fastok_cuda SHARED csrc/attention/attention_cuda.cu csrc/attention/attention_bf16.cu
            csrc/attention/attention_f16.cu csrc/attention/attention_f32.cu csrc/attention/backward_cuda.cu
            csrc/attention/backward_bf16.cu csrc/attention/backward_f16.cu csrc/attention/backward_f32.cu
            csrc/match/match_cuda.cu csrc/merge/merge_cuda.cu)
set_target_properties(fastok_cuda PROPERTIES CUDA_RUNTIME_LIBRARY Static)
target_link_libraries(fastok_cuda PRIVATE fastok_torch)
# Python loads torch's libraries privately, so that fastok_cuda must name the one its CUDA symbols come from. A torch for
# CPUs, which it may be built beside, lacks it: what is linked is an empty library of that name.
file(WRITE ${CMAKE_BINARY_DIR}/empty.cpp "")
add_library(torch_cuda SHARED ${CMAKE_BINARY_DIR}/empty.cpp)
set_target_properties(torch_cuda PROPERTIES LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/stub)
target_link_libraries(fastok_cuda PRIVATE -Wl,--push-state,--no-as-needed torch_cuda -Wl,--pop-state)
target_compile_definitions(fastok_cuda PRIVATE USE_CUDA)  # shows the stable ABI's CUDA half

string(REPLACE ";" "," host_warnings "${warnings}")
string(REPLACE ";" "," host_reproducible "${reproducible}")
# CMake 3.25.1 does not know that nvcc 13 has C++20: its own way of asking, taken over from C++, is switched off.
set_target_properties(fastok_cuda PROPERTIES CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED OFF)
target_compile_options(fastok_cuda PRIVATE -std=c++20 -Xcompiler=${host_warnings} -Xcompiler=${host_reproducible})
if(FASTOK_WERROR)
  target_compile_options(fastok_cuda PRIVATE -Werror=all-warnings)
endif()

install(TARGETS fastok_cuda LIBRARY DESTINATION .)
