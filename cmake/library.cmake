# The C++ library: src/core, src/cpu, and the CPU kernels once an instruction set.

find_package(OpenMP COMPONENTS CXX)
if(NOT OpenMP_CXX_FOUND)
  message(FATAL_ERROR "flashomni needs OpenMP in the C++ compiler, and ${CMAKE_CXX_COMPILER} has none: use GCC, or "
                      "install Clang's libomp (Debian: libomp-dev)")
endif()
find_package(Threads REQUIRED)

# Options of every object of this project.
add_library(flashomni_options INTERFACE)
target_compile_features(flashomni_options INTERFACE cxx_std_20)
target_compile_options(flashomni_options INTERFACE -Wall -Wextra)
target_include_directories(flashomni_options INTERFACE ${PROJECT_SOURCE_DIR})
target_link_libraries(flashomni_options INTERFACE OpenMP::OpenMP_CXX)
if(FLASHOMNI_SANITIZE)
  set(sanitize_flags -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer)
  # -O1: the sanitizers' checks make -O3 take minutes a kernel file.
  target_compile_options(flashomni_options INTERFACE ${sanitize_flags} -O1 -g)
  target_link_options(flashomni_options INTERFACE ${sanitize_flags})
endif()

function(flashomni_object_settings target)
  target_link_libraries(${target} PRIVATE flashomni_options)
  target_include_directories(${target} PRIVATE ${PROJECT_SOURCE_DIR}/include)
  set_target_properties(${target} PROPERTIES POSITION_INDEPENDENT_CODE ON CXX_EXTENSIONS OFF
                        CXX_VISIBILITY_PRESET hidden VISIBILITY_INLINES_HIDDEN ON)
endfunction()

file(GLOB core_sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/src/core/*.cc)
file(GLOB cpu_sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/src/cpu/*.cc)
set(kernels ${PROJECT_SOURCE_DIR}/src/cpu/kernels.cc)
list(REMOVE_ITEM cpu_sources ${kernels})

add_library(flashomni_objects OBJECT ${core_sources} ${cpu_sources})
flashomni_object_settings(flashomni_objects)
set(flashomni_all_objects $<TARGET_OBJECTS:flashomni_objects>)

# kernels.cc is compiled once an instruction set, src/cpu/isa.cc chooses at run time. No -march=native: the library
# must run on other chips than the build machine's. No -ffast-math: infinities and NaN have meaning here.
include(CheckCXXCompilerFlag)
set(avx2_flags -mavx2 -mfma -mf16c)
set(avx512_flags -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c)
set(avx512bf16_flags ${avx512_flags} -mavx512bf16)
set(flashomni_isas generic)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$" AND CMAKE_SIZEOF_VOID_P EQUAL 8)
  list(JOIN avx512bf16_flags " " newest_flags)
  check_cxx_compiler_flag("${newest_flags}" FLASHOMNI_COMPILER_HAS_X86)
  if(FLASHOMNI_COMPILER_HAS_X86)
    list(APPEND flashomni_isas avx2 avx512 avx512bf16)
    target_compile_definitions(flashomni_objects PRIVATE FLASHOMNI_CPU_HAS_X86=1)
  endif()
endif()

foreach(isa IN LISTS flashomni_isas)
  add_library(flashomni_cpu_${isa} OBJECT ${kernels})
  flashomni_object_settings(flashomni_cpu_${isa})
  target_compile_definitions(flashomni_cpu_${isa} PRIVATE FLASHOMNI_ISA=${isa})
  target_compile_options(flashomni_cpu_${isa} PRIVATE ${${isa}_flags} -ffp-contract=fast -fno-math-errno
                                                      -fno-trapping-math)
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    # GCC 12 warns of its own AVX-512 headers.
    target_compile_options(flashomni_cpu_${isa} PRIVATE -Wno-maybe-uninitialized)
  endif()
  list(APPEND flashomni_all_objects $<TARGET_OBJECTS:flashomni_cpu_${isa}>)
endforeach()

function(flashomni_library target kind name)
  add_library(${target} ${kind} ${flashomni_all_objects})
  add_library(flashomni::${target} ALIAS ${target})
  target_include_directories(${target} PUBLIC $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/include>
                                              $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)
  target_compile_features(${target} PUBLIC cxx_std_20)
  target_link_libraries(${target} PUBLIC OpenMP::OpenMP_CXX Threads::Threads ${CMAKE_DL_LIBS})
  set_target_properties(${target} PROPERTIES OUTPUT_NAME ${name} LINKER_LANGUAGE CXX
                        VERSION ${PROJECT_VERSION} SOVERSION ${PROJECT_VERSION_MAJOR}.${PROJECT_VERSION_MINOR})
  if(FLASHOMNI_SANITIZE)
    target_link_options(${target} PUBLIC ${sanitize_flags})
  endif()
endfunction()
flashomni_library(flashomni STATIC flashomni)
flashomni_library(flashomni_shared SHARED flashomni)
