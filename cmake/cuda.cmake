# The CUDA backend, libflashomni_cuda_sm90.so: a plugin that stands apart from the library, built by nvcc alone. Python
# builds the same at first use (python/flashomni/jit); which files and which digest is said there and here alike.

set(FLASHOMNI_CUDA_ARCHS 90a CACHE STRING "GPU architectures to build for; 90a (Hopper) is all today")
if(NOT "$ENV{FLASHOMNI_CUDA_ARCHS}" STREQUAL "")
  set(FLASHOMNI_CUDA_ARCHS $ENV{FLASHOMNI_CUDA_ARCHS})
endif()
if(NOT FLASHOMNI_CUDA_ARCHS STREQUAL "90a")
  message(FATAL_ERROR "FLASHOMNI_CUDA_ARCHS: expected 90a, got ${FLASHOMNI_CUDA_ARCHS}")
endif()

# Where Python looks (jit/toolkit.py), in the same order. CUDA's packages of PyPI serve too.
set(nvcc_places $ENV{CUDA_HOME}/bin $ENV{CUDA_PATH}/bin)
foreach(folder IN ITEMS ${Python_SITELIB} ${Python_PURELIB})
  list(APPEND nvcc_last_places ${folder}/nvidia/cu13/bin)
endforeach()
set(FLASHOMNI_NVCC "$ENV{FLASHOMNI_NVCC}" CACHE FILEPATH "nvcc 13.0 or newer")
if(NOT FLASHOMNI_NVCC)
  unset(FLASHOMNI_NVCC CACHE)
  find_program(FLASHOMNI_NVCC nvcc HINTS ${nvcc_places} PATHS /usr/local/cuda/bin ${nvcc_last_places})
endif()
if(NOT FLASHOMNI_NVCC)
  message(FATAL_ERROR "The CUDA backend needs nvcc 13.0 or newer: install CUDA's toolkit, or name an nvcc with "
                      "FLASHOMNI_NVCC, or build without FLASHOMNI_CUDA (FLASHOMNI_ENABLE_AOT) and let the first use "
                      "build it")
endif()
execute_process(COMMAND ${FLASHOMNI_NVCC} --version OUTPUT_VARIABLE nvcc_says RESULT_VARIABLE result)
if(NOT result EQUAL 0 OR NOT nvcc_says MATCHES "release ([0-9]+\\.[0-9]+)")
  message(FATAL_ERROR "The CUDA backend needs nvcc 13.0 or newer, and ${FLASHOMNI_NVCC} --version names no release")
endif()
if(CMAKE_MATCH_1 VERSION_LESS 13.0)
  message(FATAL_ERROR "The CUDA backend needs nvcc 13.0 or newer, and ${FLASHOMNI_NVCC} is ${CMAKE_MATCH_1}: name "
                      "another with FLASHOMNI_NVCC")
endif()
message(STATUS "CUDA backend: nvcc ${CMAKE_MATCH_1}, ${FLASHOMNI_NVCC}")

set(plugin_root ${PROJECT_SOURCE_DIR})
set(plugin_core src/core/error.cc src/core/tensor.cc)
set(plugin_files ${plugin_core})
foreach(folder IN ITEMS include/flashomni src/cuda)
  foreach(suffix IN ITEMS cu cuh h cc map options)
    file(GLOB_RECURSE found CONFIGURE_DEPENDS RELATIVE ${plugin_root} ${plugin_root}/${folder}/*.${suffix})
    list(APPEND plugin_files ${found})
  endforeach()
endforeach()
list(SORT plugin_files)
set(lines)
foreach(file IN LISTS plugin_files)
  file(SHA256 ${plugin_root}/${file} hash)
  string(APPEND lines "${file} ${hash}\n")
  # The digest is made here: another content configures anew.
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${plugin_root}/${file})
endforeach()
string(SHA256 plugin_digest "${lines}")

set(plugin_units ${plugin_files})
list(FILTER plugin_units INCLUDE REGEX "\\.cu$")
list(APPEND plugin_units ${plugin_core})
set(nvcc_command ${FLASHOMNI_NVCC} -ccbin ${CMAKE_CXX_COMPILER} --options-file
                 ${plugin_root}/src/cuda/sm90/nvcc.options)
set(plugin_objects)
file(MAKE_DIRECTORY ${PROJECT_BINARY_DIR}/cuda_sm90)
foreach(unit IN LISTS plugin_units)
  string(REPLACE "/" "_" object ${unit})
  set(object ${PROJECT_BINARY_DIR}/cuda_sm90/${object}.o)
  # Only the plugin's table knows the digest; others need no new compilation when a neighbour changes.
  set(define)
  if(unit MATCHES "plugin\\.cu$")
    set(define "-DFLASHOMNI_SOURCES=\"${plugin_digest}\"")
  endif()
  add_custom_command(
    OUTPUT ${object}
    COMMAND ${nvcc_command} -I${plugin_root} -I${plugin_root}/include ${define} -MD -MF ${object}.d
            -c ${plugin_root}/${unit} -o ${object}
    DEPENDS ${plugin_root}/${unit} ${plugin_root}/src/cuda/sm90/nvcc.options
    DEPFILE ${object}.d
    COMMENT "nvcc ${unit}" VERBATIM)
  list(APPEND plugin_objects ${object})
endforeach()

# PyPI's packages keep libraries in lib, where their nvcc does not look.
get_filename_component(nvcc_root ${FLASHOMNI_NVCC} DIRECTORY)
get_filename_component(nvcc_root ${nvcc_root} DIRECTORY)
set(link_folders)
if(EXISTS ${nvcc_root}/lib/libcudart_static.a)
  set(link_folders -L${nvcc_root}/lib)
endif()
set(plugin ${PROJECT_BINARY_DIR}/libflashomni_cuda_sm90.so)
add_custom_command(
  OUTPUT ${plugin}
  COMMAND ${nvcc_command} -shared -o ${plugin} ${plugin_objects} ${link_folders} -Xlinker
          --version-script=${plugin_root}/src/cuda/plugin.map -Xlinker --no-undefined
  DEPENDS ${plugin_objects} ${plugin_root}/src/cuda/plugin.map
  COMMENT "Linking libflashomni_cuda_sm90.so" VERBATIM)
add_custom_target(flashomni_cuda_sm90 ALL DEPENDS ${plugin})
if(SKBUILD)
  install(FILES ${plugin} DESTINATION flashomni)
else()
  install(FILES ${plugin} DESTINATION ${CMAKE_INSTALL_LIBDIR})
endif()
