/* Makes the shared library importable: `import fastrnn._C` runs the registrations of bindings*.cpp. */
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", "The C++ kernels of fastrnn.", -1, 0, 0, 0, 0, 0};

PyMODINIT_FUNC PyInit__C(void) { return PyModule_Create(&module); }
