# The kernels of one instruction set must not define weak code: the linker could take it for another instruction set's,
# and a chip without that set would stop at an illegal instruction.
# Run by ctest: cmake -DNM=... -DOBJECTS=a.o,b.o -P test_isa_objects.cmake

string(REPLACE "," ";" objects "${OBJECTS}")
foreach(object IN LISTS objects)
  execute_process(COMMAND ${NM} -C --defined-only ${object} OUTPUT_VARIABLE symbols RESULT_VARIABLE result)
  if(NOT result EQUAL 0)
    message(FATAL_ERROR "${NM} cannot read ${object}")
  endif()
  string(REGEX MATCHALL "[^\n]* [Wu] [^\n]*" weak "${symbols}")
  if(weak)
    message(FATAL_ERROR "${object} defines weak code: ${weak}")
  endif()
endforeach()
