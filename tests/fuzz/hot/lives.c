// Fuzzes pyvmm/core/hot under the run loop that users run, with a KVM that does anything (kvm.c) and no /dev/kvm.
// Usage: hot SEED SECONDS LIVES. A life is a partition of three VPs from power-on to its end; life N has the seed SEED + N.
// Ends after SECONDS or LIVES, whichever is first, and prints the numbers of lives, exits, hypercalls, storage requests,
// frames sent by NICs, and frames that came out of switches.
// Built with -fsanitize=address,undefined: what guest memory, run pages and Python objects hold has red zones.

#include "world.h"

#include <signal.h>
#include <unistd.h>

enum {
	RUNS = 8,
	EXITS_PER_RUN = 400,
	SECONDS_PER_LIFE = 60, // a life takes milliseconds
};

struct world world;
static uint64_t life;

_Noreturn void fail(const char *what)
{
	fprintf(stderr, "hot: %s\n", what);
	if (PyGILState_Check() && PyErr_Occurred())
		PyErr_Print();
	abort();
}

// Sanitizers abort too, if their options say so.
static void on_fatal(int signal)
{
	fprintf(stderr, "hot: repeat with: hot %llu 0 1\n", (unsigned long long)life);
	_exit(128 + signal);
}

static PyObject *made(PyObject *object)
{
	if (!object)
		fail("an object cannot be made");
	return object;
}

static uint8_t *add_memory(uint64_t gpa, Py_ssize_t size, bool readonly)
{
	PyObject *content = made(PyByteArray_FromStringAndSize(NULL, size));
	uint8_t *host = (uint8_t *)PyByteArray_AS_STRING(content);
	fill(host, (size_t)size);
	Py_DECREF(made(PyObject_CallMethod(world.memory, "add", "KOO", gpa, content, readonly ? Py_True : Py_False)));
	Py_DECREF(content); // the region holds it
	return host;
}

static void offer(PyObject *vp)
{
	// As in enlightenments/hypercalls.py, LAYOUTS.
	static const uint16_t layouts[][6] = {
		{2, 24, 0, 0, 0, 0},	{3, 24, 8, 0, 0, 0},   {8, 8, 0, 0, 0, 0},     {0xb, 16, 0, 0, 0, 0},
		{0x13, 32, 0, 0, 0, 1}, {0x14, 32, 8, 0, 0, 1}, {0x15, 24, 0, 0, 0, 1}, {0x50, 16, 4, 16, 0, 0},
		{0x51, 16, 32, 0, 0, 0}, {0x5c, 256, 0, 0, 0, 0}, {0x5d, 8, 0, 0, 0, 0}, {0x99, 240, 0, 0, 0, 0},
		{0x9a, 16, 4, 4, 0, 0}, {0x8001, 0, 0, 0, 8, 0},
	};
	PyObject *list = PyList_New(0);
	for (size_t i = 0; i < sizeof(layouts) / sizeof(layouts[0]); i++) {
		const uint16_t *l = layouts[i];
		PyObject *entry = made(Py_BuildValue("(IIIIIi)", l[0], l[1], l[2], l[3], l[4], l[5]));
		if (PyList_Append(list, entry) < 0)
			fail("no layout");
		Py_DECREF(entry);
	}
	Py_DECREF(made(PyObject_CallMethod(vp, "offer_hypercalls", "N", list)));
	uint8_t bitmap[SYNTHETIC_MSR_COUNT / 8];
	memset(bitmap, 0xff, sizeof(bitmap));
	if (one_in(4))
		fill(bitmap, sizeof(bitmap));
	Py_DECREF(made(PyObject_CallMethod(vp, "offer_msrs", "y#", (const char *)bitmap, (Py_ssize_t)sizeof(bitmap))));
}

static void begin(void)
{
	world.now = 1 + below(1000000);
	world.memory = made(PyObject_CallNoArgs((PyObject *)&Memory_Type));
	world.ram = add_memory(0, RAM_SIZE, false);
	world.rom = add_memory(ROM_BASE, HOT_PAGE_SIZE, true);
	world.doorbells = made(PyObject_CallNoArgs((PyObject *)&Doorbells_Type));
	world.reference = made(PyObject_CallFunction((PyObject *)&ReferenceTime_Type, "II", 2000000, 0));
	for (unsigned i = 0; i < VPS; i++) {
		PyObject *synic = made(PyObject_CallFunction((PyObject *)&SynIC_Type, "OiII", world.memory,
							     one_in(4) ? -1 : VM_FD, i, i));
		((SynICObject *)synic)->direct_timers = !one_in(4);
		PyObject *page = made(PyByteArray_FromStringAndSize(NULL, RUN_SIZE));
		world.runs[i] = (struct kvm_run *)PyByteArray_AS_STRING(page);
		memset(world.runs[i], 0, RUN_SIZE);
		world.vps[i] = made(PyObject_CallFunction((PyObject *)&Vp_Type, "iIOOOOOOOO", FIRST_VP_FD + i, i, page,
							  world.memory, synic, world.doorbells, world.reference,
							  world.stubs, world.stubs, world.stubs));
		Py_DECREF(page);
		world.synics[i] = synic;
		offer(world.vps[i]);
	}
	PyObject *peers = made(PyTuple_New(VPS));
	for (unsigned i = 0; i < VPS; i++)
		PyTuple_SET_ITEM(peers, i, Py_NewRef(world.vps[i]));
	for (unsigned i = 0; i < VPS; i++)
		Py_DECREF(made(PyObject_CallMethod(world.vps[i], "set_peers", "(O)", peers)));
	Py_DECREF(peers);
}

// What is saved comes back the same, in a new object as well.
static void check_saving(void)
{
	PyObject *synic = world.synics[below(VPS)];
	PyObject *saved = made(PyObject_CallMethod(synic, "save", NULL));
	PyObject *other = made(PyObject_CallFunction((PyObject *)&SynIC_Type, "OiII", world.memory, -1, 0, 0));
	Py_DECREF(made(PyObject_CallMethod(other, "restore", "O", saved)));
	PyObject *again = made(PyObject_CallMethod(other, "save", NULL));
	if (PyObject_RichCompareBool(saved, again, Py_EQ) != 1)
		fail("restored state is not what was saved");
	const SynICObject *left = (SynICObject *)synic, *right = (SynICObject *)other;
	if (memcmp(left->timers, right->timers, sizeof(left->timers)) ||
	    memcmp(left->sint, right->sint, sizeof(left->sint)))
		fail("restored timers or SINTs are not what was saved");
	Py_DECREF(again);
	Py_DECREF(other);
	if (one_in(2)) {
		Py_DECREF(made(PyObject_CallMethod(synic, "reset", NULL)));
		Py_DECREF(made(PyObject_CallMethod(synic, "restore", "O", saved)));
	}
	Py_DECREF(saved);
}

static void live(uint64_t seed)
{
	uint8_t rom[HOT_PAGE_SIZE];
	life = seed;
	set_seed(seed);
	alarm(SECONDS_PER_LIFE);
	begin();
	memcpy(rom, world.rom, sizeof(rom));
	for (unsigned run = 0; run < RUNS; run++) {
		world.budget = EXITS_PER_RUN;
		world.answered = NOTHING;
		PyObject *reason = PyObject_CallMethod(world.vps[below(VPS)], "run", NULL);
		if (!reason && !PyErr_ExceptionMatches(PyExc_LookupError) && !PyErr_ExceptionMatches(PyExc_OSError))
			fail("the run loop raised what nobody asked it to");
		PyErr_Clear();
		Py_XDECREF(reason);
		if (world.timer_made)
			fail("a VP that does not run has a timer");
		check_saving();
	}
	use_disks();
	use_nics();
	use_switches();
	if (memcmp(rom, world.rom, sizeof(rom)))
		fail("the ROM has changed");
	Py_CLEAR(world.ring);
	for (unsigned i = 0; i < VPS; i++) {
		Py_CLEAR(world.vps[i]);
		Py_CLEAR(world.synics[i]);
	}
	Py_CLEAR(world.doorbells);
	Py_CLEAR(world.reference);
	Py_CLEAR(world.memory);
	PyGC_Collect(); // peers know each other
}

PyMODINIT_FUNC PyInit__hot(void);

int main(int argc, char **argv)
{
	if (argc != 4) {
		fprintf(stderr, "usage: hot SEED SECONDS LIVES\n");
		return 2;
	}
	uint64_t seed = strtoull(argv[1], NULL, 0), lives = strtoull(argv[3], NULL, 0), done = 0;
	double seconds = strtod(argv[2], NULL);
	PyPreConfig pre;
	PyPreConfig_InitIsolatedConfig(&pre);
	pre.allocator = PYMEM_ALLOCATOR_MALLOC; // with red zones
	Py_PreInitialize(&pre);
	Py_InitializeEx(0);
	if (!PyInit__hot() || !(world.stubs = PyModule_Create(&stubs)))
		fail("the extension cannot be made");
	signal(SIGABRT, on_fatal);
	signal(SIGALRM, on_fatal);
	struct timespec start, now;
	clock_gettime(CLOCK_MONOTONIC, &start);
	double elapsed = 0;
	while (done < lives && (!seconds || elapsed < seconds)) {
		live(seed + done++);
		clock_gettime(CLOCK_MONOTONIC, &now);
		elapsed = (double)(now.tv_sec - start.tv_sec) + (double)(now.tv_nsec - start.tv_nsec) / 1e9;
	}
	printf("seed %llu: %llu lives, %llu exits, %llu hypercalls, %llu requests, %llu frames, %llu switched in %.1f s\n",
	       (unsigned long long)seed, (unsigned long long)done, (unsigned long long)world.exits,
	       (unsigned long long)world.hypercalls, (unsigned long long)world.requests,
	       (unsigned long long)world.frames, (unsigned long long)world.switched, elapsed);
	return 0;
}
