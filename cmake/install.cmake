# The install tree, for find_package(flashomni). Wheels know no links, so theirs has the static library alone.

include(CMakePackageConfigHelpers)
set(config_dir ${CMAKE_INSTALL_LIBDIR}/cmake/flashomni)

set(libraries flashomni)
if(NOT SKBUILD)
  list(APPEND libraries flashomni_shared)
endif()
install(TARGETS ${libraries} EXPORT flashomni
        ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR} LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(DIRECTORY ${PROJECT_SOURCE_DIR}/include/flashomni DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}
        FILES_MATCHING PATTERN *.h)
install(EXPORT flashomni NAMESPACE flashomni:: FILE flashomniTargets.cmake DESTINATION ${config_dir})

configure_package_config_file(${PROJECT_SOURCE_DIR}/cmake/flashomniConfig.cmake.in flashomniConfig.cmake
                              INSTALL_DESTINATION ${config_dir})
write_basic_package_version_file(flashomniConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/flashomniConfig.cmake ${CMAKE_CURRENT_BINARY_DIR}/flashomniConfigVersion.cmake
        DESTINATION ${config_dir})
