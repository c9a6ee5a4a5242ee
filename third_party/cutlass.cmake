# CUTLASS_INCLUDE_DIR: the headers of CUTLASS 4.2, from CUTLASS_DIR (a checkout), else from the nvidia-cutlass wheel, in
# .venv/cutlass (`make .venv/.cutlass`) or beside the Python in use.
set(CUTLASS_DIR "" CACHE PATH "A checkout of CUTLASS; by default its wheel is looked for")
execute_process(
  COMMAND ${Python_EXECUTABLE} -c "import sysconfig; print(sysconfig.get_path('purelib'))"
  OUTPUT_VARIABLE site_packages OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
set(wheel_headers cutlass_library/source/include)
find_path(CUTLASS_INCLUDE_DIR cute/arch/mma_sm90_gmma.hpp NO_DEFAULT_PATH
          PATHS ${CUTLASS_DIR}/include ${CMAKE_SOURCE_DIR}/.venv/cutlass/${wheel_headers} ${site_packages}/${wheel_headers})
