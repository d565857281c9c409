#include "hot.h"

PyObject *RingError;

static PyMethodDef hot_methods[] = {
	{"data_runs", hot_data_runs, METH_VARARGS, NULL},
	{"crc32c", hot_crc32c, METH_VARARGS, NULL},
	{0},
};

static struct PyModuleDef hot_module = {
	PyModuleDef_HEAD_INIT,
	.m_name = "pyvmm.core._hot",
	.m_methods = hot_methods,
	.m_size = -1,
};

PyMODINIT_FUNC PyInit__hot(void)
{
	if (!hot_vp_install_kick())
		return PyErr_SetFromErrno(PyExc_OSError);
	PyObject *module = PyModule_Create(&hot_module);
	if (!module)
		return NULL;
	PyTypeObject *types[] = {
		&Memory_Type, &ReferenceTime_Type, &Doorbells_Type,  &Ring_Type,
		&SynIC_Type,  &Vp_Type,            &BlockTable_Type, &FastDisk_Type, &StorageQueue_Type,
		&NetDevice_Type, &NetQueue_Type, &Switch_Type,
	};
	for (size_t i = 0; i < sizeof(types) / sizeof(types[0]); i++) {
		if (PyModule_AddType(module, types[i]) < 0)
			goto fail;
	}
	RingError = PyErr_NewException("pyvmm.core._hot.RingError", PyExc_ValueError, NULL);
	if (!RingError || PyModule_AddObjectRef(module, "RingError", RingError) < 0)
		goto fail;
	if (!hot_net_add_constants(module))
		goto fail;
	return module;
fail:
	Py_DECREF(module);
	return NULL;
}
