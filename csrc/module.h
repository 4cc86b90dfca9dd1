// An extension module without contents: importing it registers the operators that its library holds.
#pragma once

#include <Python.h>

#define NTPSEG_MODULE(name)                                                        \
  extern "C" PyMODINIT_FUNC PyInit_##name(void) {                                  \
    static PyModuleDef module = {PyModuleDef_HEAD_INIT, #name, nullptr, -1, nullptr}; \
    return PyModule_Create(&module);                                               \
  }
