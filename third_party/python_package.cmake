# SPDX-License-Identifier: Apache-2.0
# Where an installed Python package lies, without importing it.
#   find_python_package(VARIABLE module)    sets VARIABLE to its folder, or to VARIABLE-NOTFOUND
function(find_python_package variable module)
  if(NOT Python_EXECUTABLE)
    find_package(Python 3.10 REQUIRED COMPONENTS Interpreter)
  endif()
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c
            "import importlib.util as u; s = u.find_spec('${module}'); print(list(s.submodule_search_locations)[0] if s else '')"
    OUTPUT_VARIABLE folder OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  if(folder)
    set(${variable} ${folder} PARENT_SCOPE)
  else()
    set(${variable} ${variable}-NOTFOUND PARENT_SCOPE)
  endif()
endfunction()
