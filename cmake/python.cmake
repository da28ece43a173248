# libflashomni_ffi: what Python loads. Needs a Python that has apache-tvm-ffi; binds to no Python and no torch.

find_package(Python COMPONENTS Interpreter REQUIRED)
execute_process(COMMAND ${Python_EXECUTABLE} -m tvm_ffi.config --cmakedir
                OUTPUT_VARIABLE tvm_ffi_cmake_dir OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE result)
if(NOT result EQUAL 0)
  message(FATAL_ERROR "FLASHOMNI_PYTHON=ON needs apache-tvm-ffi in ${Python_EXECUTABLE}: install it with "
                      "`pip install apache-tvm-ffi`, or point CMake to another Python with -DPython_EXECUTABLE=")
endif()
find_package(tvm_ffi CONFIG REQUIRED PATHS ${tvm_ffi_cmake_dir} NO_DEFAULT_PATH)

file(GLOB binding_sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/src/bindings/*.cc
                                            ${PROJECT_SOURCE_DIR}/src/bindings/*.cpp)
add_library(flashomni_ffi SHARED ${binding_sources})
flashomni_object_settings(flashomni_ffi)
target_link_libraries(flashomni_ffi PRIVATE flashomni tvm_ffi::shared)
target_compile_definitions(flashomni_ffi PRIVATE FLASHOMNI_VERSION="${PROJECT_VERSION}")
# The core's symbols stay inside, so that a C++ program's own libflashomni and this one never mix.
target_link_options(flashomni_ffi PRIVATE LINKER:--exclude-libs,libflashomni.a)
# tvm_ffi is loaded by its Python package first: no path to it belongs in the file.
set_target_properties(flashomni_ffi PROPERTIES SKIP_BUILD_RPATH ON INSTALL_RPATH "")

if(SKBUILD)
  install(TARGETS flashomni_ffi LIBRARY DESTINATION flashomni)
  # What the first use of a GPU compiles (python/flashomni/jit/sources.py).
  set(csrc flashomni/csrc)
  install(DIRECTORY src/cuda DESTINATION ${csrc}/src FILES_MATCHING PATTERN *.cu PATTERN *.cuh PATTERN *.h
          PATTERN *.map PATTERN *.options)
  install(FILES src/core/error.cc src/core/tensor.cc DESTINATION ${csrc}/src/core)
else()
  # A plain CMake build serves the checkout's own Python sources.
  set_target_properties(flashomni_ffi PROPERTIES LIBRARY_OUTPUT_DIRECTORY ${PROJECT_SOURCE_DIR}/python/flashomni)
endif()
