/*
 * The device's side of virtqueues, compiled: what split_device.py and packed_device.py do, with the same interface and
 * the same answers. Tests run over both; change both.
 *
 * Shared memory is read once per value. Words that the driver polls are written by one aligned access; an acquire load
 * precedes what depends on it, a release store follows what it announces, and a sequentially consistent fence stands
 * between announcing and looking whether the driver sleeps. So no fences are passed in: the argument is ignored.
 *
 * Buffers of the ring and of the regions are held by Py_buffer, which keeps them mapped; a request holds the regions
 * that it lies in.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <structmember.h>
#include <time.h>

#if !defined(__GNUC__)
#error "GCC or Clang is needed"
#endif
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "pyvhost's rings need a little-endian host"
#endif

enum { F_NEXT = 1, F_WRITE = 2, F_INDIRECT = 4, F_AVAIL = 1 << 7, F_USED = 1 << 15, F_BOTH = F_AVAIL | F_USED };
enum { NO_SIGNAL = 1 };
enum { EVENT_ENABLE = 0, EVENT_DISABLE = 1, EVENT_DESC = 2 };
enum { MAX_SIZE = 1 << 15, INLINE = 4, FREE_CHAINS = 64, BIG_COPY = 1 << 18 };

#define MAX_TOTAL (UINT64_C(1) << 32)

static PyObject *RingError, *StateError, *MemoryFault, *deque;
static PyObject *str_regions, *str_guest_addr, *str_size, *str_view, *str_readonly, *str_popleft, *str_unpack;

struct desc {
	uint64_t addr;
	uint32_t len;
	uint16_t three; /* split: flags, packed: id */
	uint16_t four;  /* split: next, packed: flags */
};

static inline uint16_t load16(const void *p)
{
	return __atomic_load_n((const uint16_t *)p, __ATOMIC_RELAXED);
}

static inline uint16_t load16_acquire(const void *p)
{
	return __atomic_load_n((const uint16_t *)p, __ATOMIC_ACQUIRE);
}

static inline void store16(void *p, uint16_t value)
{
	__atomic_store_n((uint16_t *)p, value, __ATOMIC_RELAXED);
}

static inline void store16_release(void *p, uint16_t value)
{
	__atomic_store_n((uint16_t *)p, value, __ATOMIC_RELEASE);
}

static inline void store32(void *p, uint32_t value)
{
	__atomic_store_n((uint32_t *)p, value, __ATOMIC_RELAXED);
}

static inline void full_fence(void)
{
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
}

/* One read of shared memory: the compiler may not go back to it later. */
static inline void load_desc(struct desc *d, const char *p)
{
	memcpy(d, p, sizeof *d);
	__asm__ volatile("" : "+m"(*d) : : "memory");
}

/* --- regions ------------------------------------------------------------------------------------------------- */

typedef struct {
	PyObject_HEAD
	uint64_t guest;
	uint64_t size;
	char *ptr;
	PyObject *view, *readonly;
	Py_buffer buffer;
} Region;

static void region_dealloc(Region *self)
{
	if (self->buffer.obj)
		PyBuffer_Release(&self->buffer);
	Py_XDECREF(self->view);
	Py_XDECREF(self->readonly);
	PyObject_Free(self);
}

static PyTypeObject RegionType = {
	PyVarObject_HEAD_INIT(NULL, 0)
	.tp_name = "pyvhost.vring._fastqueue._Region",
	.tp_basicsize = sizeof(Region),
	.tp_dealloc = (destructor)region_dealloc,
	.tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
};

static int attribute_u64(PyObject *o, PyObject *name, uint64_t *value)
{
	PyObject *number = PyObject_GetAttr(o, name);
	if (!number)
		return -1;
	*value = PyLong_AsUnsignedLongLong(number);
	Py_DECREF(number);
	return PyErr_Occurred() ? -1 : 0;
}

static Region *region_new(PyObject *line)
{
	Region *self = PyObject_New(Region, &RegionType);
	if (!self)
		return NULL;
	self->view = self->readonly = NULL;
	self->buffer.obj = NULL;
	if (attribute_u64(line, str_guest_addr, &self->guest) < 0 || attribute_u64(line, str_size, &self->size) < 0)
		goto error;
	self->view = PyObject_GetAttr(line, str_view);
	self->readonly = self->view ? PyObject_GetAttr(line, str_readonly) : NULL;
	if (!self->readonly || PyObject_GetBuffer(self->view, &self->buffer, PyBUF_SIMPLE) < 0)
		goto error;
	if ((uint64_t)self->buffer.len != self->size || self->buffer.readonly) {
		PyErr_SetString(MemoryFault, "a memory region that is not mapped any more");
		goto error;
	}
	self->ptr = self->buffer.buf;
	return self;
error:
	Py_DECREF(self);
	return NULL;
}

typedef struct {
	char *ptr;
	uint64_t len;
	Region *region;
} Segment;

/* --- chains -------------------------------------------------------------------------------------------------- */

typedef struct {
	PyObject_HEAD
	unsigned int head;
	uint32_t entries; /* packed: descriptors in the ring */
	uint16_t first, last; /* packed: its entries in the inflight record */
	Py_ssize_t readables, segments; /* readable ones, all */
	unsigned long long readable_bytes, writable_bytes;
	Segment *segment;
	Segment few[INLINE];
} Chain;

static PyTypeObject ChainType;
static Chain *free_chains[FREE_CHAINS];
static int free_chain_count;

static void chain_dealloc(Chain *self)
{
	for (Py_ssize_t n = 0; n < self->segments; n++)
		Py_DECREF(self->segment[n].region);
	if (self->segment != self->few)
		PyMem_Free(self->segment);
	if (free_chain_count < FREE_CHAINS)
		free_chains[free_chain_count++] = self;
	else
		PyObject_Free(self);
}

static Chain *chain_new(unsigned int head, uint32_t entries, const Segment *segments, Py_ssize_t readables, Py_ssize_t count,
			uint64_t readable_bytes, uint64_t writable_bytes)
{
	Chain *self;
	if (free_chain_count) {
		self = free_chains[--free_chain_count];
		PyObject_Init((PyObject *)self, &ChainType);
	} else {
		self = PyObject_New(Chain, &ChainType);
		if (!self)
			return NULL;
	}
	self->head = head;
	self->entries = entries;
	self->readables = readables;
	self->readable_bytes = readable_bytes;
	self->writable_bytes = writable_bytes;
	self->segments = 0;
	self->segment = self->few;
	if (count > INLINE) {
		self->segment = PyMem_Malloc((size_t)count * sizeof *segments);
		if (!self->segment) {
			self->segment = self->few;
			Py_DECREF(self);
			PyErr_NoMemory();
			return NULL;
		}
	}
	for (Py_ssize_t n = 0; n < count; n++) {
		self->segment[n] = segments[n];
		Py_INCREF(segments[n].region);
	}
	self->segments = count;
	return self;
}

static PyObject *chain_views(const Chain *self, Py_ssize_t from, Py_ssize_t to)
{
	PyObject *list = PyList_New(to - from);
	for (Py_ssize_t n = from; list && n < to; n++) {
		const Segment *s = &self->segment[n];
		Py_ssize_t start = s->ptr - s->region->ptr;
		PyObject *whole = n < self->readables ? s->region->readonly : s->region->view;
		PyObject *view = PySequence_GetSlice(whole, start, start + (Py_ssize_t)s->len);
		if (!view)
			Py_CLEAR(list);
		else
			PyList_SET_ITEM(list, n - from, view);
	}
	return list;
}

static PyObject *chain_readable(Chain *self, void *closure)
{
	return chain_views(self, 0, self->readables);
}

static PyObject *chain_writable(Chain *self, void *closure)
{
	return chain_views(self, self->readables, self->segments);
}

/* Copy between ``flat`` and the segments, from byte ``offset`` of those on. The caller has checked the range. */
static void copy(const Segment *s, uint64_t offset, char *flat, uint64_t length, int to_segments)
{
	while (length) {
		if (offset >= s->len) {
			offset -= s->len;
			s++;
			continue;
		}
		uint64_t count = s->len - offset;
		if (count > length)
			count = length;
		if (to_segments)
			memcpy(s->ptr + offset, flat, count);
		else
			memcpy(flat, s->ptr + offset, count);
		flat += count;
		length -= count;
		offset = 0;
		s++;
	}
}

static void copy_any(const Segment *s, uint64_t offset, char *flat, uint64_t length, int to_segments)
{
	if (length >= BIG_COPY) {
		Py_BEGIN_ALLOW_THREADS
		copy(s, offset, flat, length, to_segments);
		Py_END_ALLOW_THREADS
	} else {
		copy(s, offset, flat, length, to_segments);
	}
}

/* Sort positional and keyword arguments into ``out``, which has NULLs where there are none. */
static int arguments(const char *function, const char *const *names, int required, int most, PyObject *const *args,
		     Py_ssize_t nargs, PyObject *kwnames, PyObject **out)
{
	if (nargs > most) {
		PyErr_Format(PyExc_TypeError, "%s() takes at most %d arguments", function, most);
		return -1;
	}
	for (int n = 0; n < most; n++)
		out[n] = n < nargs ? args[n] : NULL;
	Py_ssize_t keywords = kwnames ? PyTuple_GET_SIZE(kwnames) : 0;
	for (Py_ssize_t k = 0; k < keywords; k++) {
		int n = 0;
		while (n < most && PyUnicode_CompareWithASCIIString(PyTuple_GET_ITEM(kwnames, k), names[n]))
			n++;
		if (n == most || out[n]) {
			PyErr_Format(PyExc_TypeError, "%s() got an unexpected argument %R", function,
				     PyTuple_GET_ITEM(kwnames, k));
			return -1;
		}
		out[n] = args[nargs + k];
	}
	for (int n = 0; n < required; n++) {
		if (!out[n]) {
			PyErr_Format(PyExc_TypeError, "%s() misses argument '%s'", function, names[n]);
			return -1;
		}
	}
	return 0;
}

static PyObject *chain_read(Chain *self, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
	static const char *const names[] = {"offset", "length"};
	PyObject *given[2];
	Py_ssize_t offset = 0, length = PY_SSIZE_T_MAX;
	if (arguments("read", names, 0, 2, args, nargs, kwnames, given) < 0)
		return NULL;
	if (given[0] && (offset = PyNumber_AsSsize_t(given[0], NULL)) == -1 && PyErr_Occurred())
		return NULL;
	if (given[1] && given[1] != Py_None && (length = PyNumber_AsSsize_t(given[1], NULL)) == -1 && PyErr_Occurred())
		return NULL;
	if (offset < 0) {
		PyErr_SetString(PyExc_ValueError, "a negative offset");
		return NULL;
	}
	uint64_t left = (uint64_t)offset < self->readable_bytes ? self->readable_bytes - (uint64_t)offset : 0;
	if (length < 0)
		length = 0;
	if ((uint64_t)length > left)
		length = (Py_ssize_t)left;
	PyObject *bytes = PyBytes_FromStringAndSize(NULL, length);
	if (bytes && length)
		copy_any(self->segment, (uint64_t)offset, PyBytes_AS_STRING(bytes), (uint64_t)length, 0);
	return bytes;
}

static PyObject *chain_unpack(Chain *self, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
	static const char *const names[] = {"layout", "offset"};
	PyObject *given[2];
	Py_ssize_t offset = 0;
	if (arguments("unpack", names, 1, 2, args, nargs, kwnames, given) < 0)
		return NULL;
	if (given[1] && (offset = PyNumber_AsSsize_t(given[1], NULL)) == -1 && PyErr_Occurred())
		return NULL;
	PyObject *number = PyObject_GetAttr(given[0], str_size);
	if (!number)
		return NULL;
	Py_ssize_t size = PyNumber_AsSsize_t(number, PyExc_OverflowError);
	Py_DECREF(number);
	if (size == -1 && PyErr_Occurred())
		return NULL;
	if (offset < 0 || size < 0 || (uint64_t)offset + (uint64_t)size > self->readable_bytes)
		return PyErr_Format(PyExc_ValueError, "%zd bytes from %zd on are not in %llu readable bytes", size, offset,
				    self->readable_bytes);
	PyObject *bytes = PyBytes_FromStringAndSize(NULL, size), *fields = NULL;
	if (bytes) {
		if (size)
			copy_any(self->segment, (uint64_t)offset, PyBytes_AS_STRING(bytes), (uint64_t)size, 0);
		fields = PyObject_CallMethodOneArg(given[0], str_unpack, bytes);
		Py_DECREF(bytes);
	}
	return fields;
}

static PyObject *chain_write(Chain *self, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
	static const char *const names[] = {"data", "offset"};
	PyObject *given[2];
	Py_ssize_t offset = 0;
	Py_buffer data;
	if (arguments("write", names, 1, 2, args, nargs, kwnames, given) < 0)
		return NULL;
	if (given[1] && (offset = PyNumber_AsSsize_t(given[1], NULL)) == -1 && PyErr_Occurred())
		return NULL;
	if (offset < 0) {
		PyErr_SetString(PyExc_ValueError, "a negative offset");
		return NULL;
	}
	if (PyObject_GetBuffer(given[0], &data, PyBUF_SIMPLE) < 0)
		return NULL;
	uint64_t end = (uint64_t)offset + (uint64_t)data.len; /* both are below 2^63 */
	PyObject *result = NULL;
	if (end > self->writable_bytes) {
		PyErr_Format(PyExc_ValueError, "%llu bytes do not fit in %llu writable bytes", (unsigned long long)end,
			     self->writable_bytes);
	} else {
		if (data.len)
			copy_any(self->segment + self->readables, (uint64_t)offset, data.buf, (uint64_t)data.len, 1);
		result = PyLong_FromUnsignedLongLong(end);
	}
	PyBuffer_Release(&data);
	return result;
}

static PyObject *chain_repr(Chain *self)
{
	return PyUnicode_FromFormat("<Chain head=%u readable=%llu writable=%llu>", self->head, self->readable_bytes,
				    self->writable_bytes);
}

static PyMemberDef chain_members[] = {
	{"head", T_UINT, offsetof(Chain, head), READONLY, NULL},
	{"readable_bytes", T_ULONGLONG, offsetof(Chain, readable_bytes), READONLY, NULL},
	{"writable_bytes", T_ULONGLONG, offsetof(Chain, writable_bytes), READONLY, NULL},
	{NULL},
};

static PyGetSetDef chain_getset[] = {
	{"readable", (getter)chain_readable, NULL, NULL, NULL},
	{"writable", (getter)chain_writable, NULL, NULL, NULL},
	{NULL},
};

static PyMethodDef chain_methods[] = {
	{"read", (PyCFunction)(void (*)(void))chain_read, METH_FASTCALL | METH_KEYWORDS, NULL},
	{"unpack", (PyCFunction)(void (*)(void))chain_unpack, METH_FASTCALL | METH_KEYWORDS, NULL},
	{"write", (PyCFunction)(void (*)(void))chain_write, METH_FASTCALL | METH_KEYWORDS, NULL},
	{NULL},
};

static PyTypeObject ChainType = {
	PyVarObject_HEAD_INIT(NULL, 0)
	.tp_name = "pyvhost.vring._fastqueue.Chain",
	.tp_doc = "As pyvhost.vring.api.Chain.",
	.tp_basicsize = sizeof(Chain),
	.tp_dealloc = (destructor)chain_dealloc,
	.tp_repr = (reprfunc)chain_repr,
	.tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
	.tp_members = chain_members,
	.tp_getset = chain_getset,
	.tp_methods = chain_methods,
};

/* --- queues -------------------------------------------------------------------------------------------------- */

typedef struct {
	PyObject_HEAD
	unsigned int size;
	unsigned int spin_us;
	char stopped;
	char packed, event_idx, indirect, fresh, asking;
	PyObject *broken, *signal;

	Py_buffer part[3]; /* desc, avail, used; obj is NULL when there is none */
	char *desc, *avail, *used;
	Region **region; /* ordered by guest address */
	Py_ssize_t regions;
	Region *last; /* the one hit last, borrowed from the table */

	Chain **held; /* what is in flight, by head */
	uint32_t in_flight;
	uint32_t occupied; /* packed: descriptors of all those */

	uint32_t next, seen, used_idx, signalled; /* split: indexes; packed: positions, the middle two unused */
	uint32_t wrap, used_wrap, since;	  /* packed */

	uint32_t max; /* descriptors of one chain */
	Segment *segment;
	Py_ssize_t segments, readables, room;
	uint64_t readable_bytes, writable_bytes;
	char *table; /* the private copy of an indirect table, or of a packed chain */
	size_t table_bytes;

	uint32_t spin_misses, spin_skip;

	Py_buffer record; /* this queue's part of the inflight region; obj is NULL when there is none */
	uint64_t record_counter;
	uint16_t *links; /* packed: the private copy of its list of free entries */
	uint32_t links_count, record_free;
	PyObject *kept; /* packed: what it said when the queue was stopped */
	PyObject *recovered; /* a deque of chains */

	PyObject *log, *mark, *log_used; /* RingLog and its fields; NULL: nothing is logged */
} Queue;

static int mark(Queue *q, const Chain *chain, uint64_t offset, uint64_t length);

static PyTypeObject SplitType, PackedType;

static uint32_t heads(const Queue *q)
{
	return q->packed ? 1 << 16 : q->size;
}

static void drop_regions(Region **table, Py_ssize_t count)
{
	for (Py_ssize_t n = 0; n < count; n++)
		Py_DECREF(table[n]);
	PyMem_Free(table);
}

static void drop_memory(Queue *q)
{
	Region **table = q->region;
	Py_ssize_t count = q->regions;
	q->region = NULL;
	q->regions = 0;
	q->last = NULL;
	q->desc = q->avail = q->used = NULL;
	for (int n = 0; n < 3; n++)
		if (q->part[n].obj)
			PyBuffer_Release(&q->part[n]);
	drop_regions(table, count);
}

static void drop_record(Queue *q)
{
	if (q->record.obj)
		PyBuffer_Release(&q->record);
	PyMem_RawFree(q->links);
	q->links = NULL;
	q->links_count = 0;
}

static int bind_memory(Queue *q, PyObject *memory, PyObject *const parts[3])
{
	uint64_t size = q->size;
	uint64_t need[3] = {16 * size, q->packed ? 4 : 6 + 2 * size, q->packed ? 4 : 6 + 8 * size};
	uintptr_t align[3] = {4, 2, q->packed ? 2 : 4};
	Py_buffer part[3] = {{.obj = NULL}, {.obj = NULL}, {.obj = NULL}};
	Region **table = NULL;
	Py_ssize_t count = 0;
	PyObject *lines = NULL, *regions = NULL;

	for (int n = 0; n < 3; n++) {
		if (PyObject_GetBuffer(parts[n], &part[n], PyBUF_WRITABLE) < 0)
			goto error;
		if ((uint64_t)part[n].len < need[n]) {
			PyErr_SetString(RingError, "a part of the ring is too small for its size");
			goto error;
		}
		if ((uintptr_t)part[n].buf & (align[n] - 1)) {
			PyErr_SetString(RingError, "a part of the ring is misaligned");
			goto error;
		}
	}
	regions = PyObject_GetAttr(memory, str_regions);
	if (!regions)
		goto error;
	lines = PySequence_Fast(regions, "regions");
	if (!lines)
		goto error;
	Py_ssize_t lines_count = PySequence_Fast_GET_SIZE(lines);
	table = PyMem_Calloc(lines_count ? (size_t)lines_count : 1, sizeof *table);
	if (!table) {
		PyErr_NoMemory();
		goto error;
	}
	for (; count < lines_count; count++) {
		table[count] = region_new(PySequence_Fast_GET_ITEM(lines, count));
		if (!table[count])
			goto error;
	}
	Py_DECREF(lines);
	Py_DECREF(regions);
	drop_memory(q);
	q->region = table;
	q->regions = count;
	q->last = count ? table[0] : NULL;
	memcpy(q->part, part, sizeof part);
	q->desc = part[0].buf;
	q->avail = part[1].buf;
	q->used = part[2].buf;
	return 0;
error:
	for (int n = 0; n < 3; n++)
		if (part[n].obj)
			PyBuffer_Release(&part[n]);
	Py_XDECREF(lines);
	Py_XDECREF(regions);
	drop_regions(table, count);
	return -1;
}

static PyObject *queue_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
	static char *names[] = {"size",	    "memory",	 "desc",   "avail",	      "used",	 "fences", "base",
				"indirect", "event_idx", "signal", "max_descriptors", "spin_us", NULL};
	PyObject *memory, *parts[3], *fences, *base_given = NULL, *signal = Py_None;
	Py_ssize_t size, max = 1024;
	unsigned int spin_us = 0;
	int indirect = 1, event_idx = 0;
	char packed = type == &PackedType;
	unsigned long base = packed ? 0x80008000UL : 0;
	if (!PyArg_ParseTupleAndKeywords(args, kwargs, "nOOOO|$OOppOnI", names, &size, &memory, &parts[0], &parts[1],
					 &parts[2], &fences, &base_given, &indirect, &event_idx, &signal, &max, &spin_us))
		return NULL;
	if (base_given) {
		base = PyLong_AsUnsignedLongMask(base_given);
		if (PyErr_Occurred())
			return NULL;
	}
	if (size <= 0 || size > MAX_SIZE || (!packed && size & (size - 1)))
		return PyErr_Format(RingError, "a %s ring cannot have %zd entries", packed ? "packed" : "split", size);
	uint32_t next = base & (packed ? 0x7FFF : 0xFFFF), used_next = base >> 16 & 0x7FFF;
	if (packed && (next >= size || used_next >= size))
		return PyErr_Format(RingError, "a base of 0x%x for a ring of %zd entries", (unsigned int)base, size);

	Queue *q = (Queue *)type->tp_alloc(type, 0);
	if (!q)
		return NULL;
	q->packed = packed;
	q->size = (unsigned int)size;
	q->spin_us = spin_us;
	q->indirect = (char)indirect;
	q->event_idx = (char)event_idx;
	q->fresh = q->asking = 1;
	q->max = (uint32_t)(max < size ? size : max > MAX_SIZE ? MAX_SIZE : max);
	q->signal = signal != Py_None ? Py_NewRef(signal) : NULL;
	q->next = q->seen = next;
	q->wrap = base >> 15 & 1;
	q->used_wrap = base >> 31 & 1;
	q->held = PyMem_RawCalloc(heads(q), sizeof *q->held);
	if (!q->held) {
		PyErr_NoMemory();
		goto error;
	}
	q->recovered = PyObject_CallNoArgs(deque);
	if (!q->recovered)
		goto error;
	if (bind_memory(q, memory, parts) < 0)
		goto error;
	q->used_idx = packed ? used_next : load16(q->used + 2); /* the split ring remembers it across a stop */
	q->signalled = q->used_idx;
	return (PyObject *)q;
error:
	Py_DECREF(q);
	return NULL;
}

static int queue_traverse(Queue *q, visitproc visit, void *arg)
{
	Py_VISIT(q->recovered);
	Py_VISIT(q->log);
	Py_VISIT(q->mark);
	Py_VISIT(q->signal);
	Py_VISIT(q->broken);
	return 0;
}

static int queue_clear(Queue *q)
{
	Py_CLEAR(q->recovered);
	Py_CLEAR(q->kept);
	Py_CLEAR(q->log);
	Py_CLEAR(q->mark);
	Py_CLEAR(q->log_used);
	Py_CLEAR(q->signal);
	Py_CLEAR(q->broken);
	return 0;
}

static void queue_dealloc(Queue *q)
{
	PyObject_GC_UnTrack(q);
	queue_clear(q);
	drop_memory(q);
	drop_record(q);
	for (uint32_t n = 0, left = q->in_flight; left && n < heads(q); n++) {
		if (q->held[n]) {
			Py_DECREF(q->held[n]);
			left--;
		}
	}
	PyMem_RawFree(q->held);
	PyMem_RawFree(q->segment);
	PyMem_RawFree(q->table);
	Py_TYPE(q)->tp_free(q);
}

static PyObject *queue_rebind(Queue *q, PyObject *args)
{
	PyObject *memory, *parts[3];
	if (!PyArg_ParseTuple(args, "OOOO", &memory, &parts[0], &parts[1], &parts[2]))
		return NULL;
	if (bind_memory(q, memory, parts) < 0)
		return NULL;
	Py_RETURN_NONE;
}

/* --- translation */

static const char OUTSIDE[] = "guest address outside of all memory regions";
static const char NO_MEMORY[] = "out of memory";

static Region *find(Queue *q, uint64_t addr)
{
	Py_ssize_t low = 0, high = q->regions;
	while (low < high) {
		Py_ssize_t middle = low + (high - low) / 2;
		Region *r = q->region[middle];
		if (addr < r->guest)
			high = middle;
		else if (addr - r->guest >= r->size)
			low = middle + 1;
		else
			return q->last = r;
	}
	return NULL;
}

/* The next piece of the range, which may go on in another region; advances both. */
static const char *piece(Queue *q, uint64_t *addr, uint64_t *length, char **ptr, uint64_t *count)
{
	Region *r = q->last;
	if (!r || *addr - r->guest >= r->size) {
		r = find(q, *addr);
		if (!r)
			return OUTSIDE;
	}
	uint64_t offset = *addr - r->guest;
	*count = r->size - offset < *length ? r->size - offset : *length;
	*ptr = r->ptr + offset;
	*addr += *count;
	*length -= *count;
	if (*length && !*addr)
		return "a range that ends beyond 2^64";
	return NULL;
}

static const char *add_segments(Queue *q, uint64_t addr, uint64_t length, int write)
{
	if (!length)
		return "a descriptor of no bytes";
	if (!write && q->segments > q->readables)
		return "a readable descriptor after a writable one";
	if (write)
		q->writable_bytes += length;
	else
		q->readable_bytes += length;
	if (q->readable_bytes + q->writable_bytes > MAX_TOTAL)
		return "a descriptor chain of more than 2^32 bytes";
	while (length) {
		if (q->segments == q->room) {
			Py_ssize_t room = q->room ? 2 * q->room : 64;
			Segment *more = PyMem_RawRealloc(q->segment, (size_t)room * sizeof *more);
			if (!more)
				return NO_MEMORY;
			q->segment = more;
			q->room = room;
		}
		Segment *s = &q->segment[q->segments];
		const char *why = piece(q, &addr, &length, &s->ptr, &s->len);
		if (why)
			return why;
		s->region = q->last;
		q->segments++;
		if (!write)
			q->readables++;
	}
	return NULL;
}

static const char *table_room(Queue *q, size_t bytes)
{
	if (bytes > q->table_bytes) {
		char *more = PyMem_RawRealloc(q->table, bytes);
		if (!more)
			return NO_MEMORY;
		q->table = more;
		q->table_bytes = bytes;
	}
	return NULL;
}

/* A private copy of an indirect table, so that the guest cannot change it under the walk. */
static const char *indirect_table(Queue *q, uint64_t addr, uint64_t length, int next, uint32_t left)
{
	if (!q->indirect)
		return "an indirect descriptor, which was not negotiated";
	if (next)
		return "an indirect descriptor with a next one";
	if (!length || length & 15 || length >> 4 > left)
		return "an indirect table of a bad length";
	const char *why = table_room(q, length);
	char *to = q->table;
	while (!why && length) {
		char *ptr;
		uint64_t count;
		why = piece(q, &addr, &length, &ptr, &count);
		if (!why) {
			memcpy(to, ptr, count);
			to += count;
		}
	}
	__asm__ volatile("" : : : "memory");
	return why;
}

static void begin_walk(Queue *q)
{
	q->segments = q->readables = 0;
	q->readable_bytes = q->writable_bytes = 0;
}

static const char *walk_split(Queue *q, uint32_t head)
{
	uint32_t index = head, entries = q->size, left = q->max;
	int in_table = 0;
	struct desc d;
	begin_walk(q);
	for (;;) {
		const char *why;
		if (in_table)
			memcpy(&d, q->table + 16 * (size_t)index, sizeof d);
		else
			load_desc(&d, q->desc + 16 * (size_t)index);
		if (d.three & F_INDIRECT) {
			if (in_table)
				return "an indirect descriptor within an indirect table";
			why = indirect_table(q, d.addr, d.len, d.three & F_NEXT, left);
			if (why)
				return why;
			in_table = 1;
			entries = d.len >> 4;
			index = 0;
			continue;
		}
		if (!left--)
			return "a descriptor chain that is too long or a loop";
		why = add_segments(q, d.addr, d.len, d.three & F_WRITE);
		if (why)
			return why;
		if (!(d.three & F_NEXT))
			return NULL;
		index = d.four;
		if (index >= entries)
			return "a descriptor's next is outside of its table";
	}
}

/* The ``count`` descriptors of a packed chain are in ``table``. */
static const char *walk_packed(Queue *q, uint32_t count)
{
	struct desc d;
	const char *why;
	begin_walk(q);
	memcpy(&d, q->table, sizeof d);
	int in_table = d.four & F_INDIRECT;
	if (in_table) {
		why = indirect_table(q, d.addr, d.len, d.four & F_NEXT, q->max);
		if (why)
			return why;
		count = d.len >> 4;
	}
	for (uint32_t n = 0; n < count; n++) {
		memcpy(&d, q->table + 16 * (size_t)n, sizeof d);
		if (d.four & F_INDIRECT)
			return in_table ? "an indirect descriptor within an indirect table"
					: "an indirect descriptor within a chain";
		why = add_segments(q, d.addr, d.len, d.four & F_WRITE);
		if (why)
			return why;
	}
	return NULL;
}

/* --- signals */

static int should_notify(Queue *q)
{
	if (q->stopped)
		return 0;
	if (q->packed) {
		uint32_t since = q->since;
		if (!since)
			return 0;
		full_fence(); /* the flags are visible before looking whether the driver sleeps */
		q->since = 0;
		uint16_t wish = load16_acquire(q->avail + 2) & 3;
		if (wish == EVENT_DISABLE)
			return 0;
		if (wish == EVENT_DESC && q->event_idx && !q->fresh && since < q->size) {
			uint16_t event = load16(q->avail);
			int32_t position = event & 0x7FFF;
			if ((uint32_t)(event >> 15) != q->used_wrap)
				position -= (int32_t)q->size;
			return (int32_t)q->used_idx - (int32_t)since <= position && position < (int32_t)q->used_idx;
		}
	} else {
		uint16_t used = (uint16_t)q->used_idx, since = (uint16_t)q->signalled;
		if (since == used)
			return 0;
		full_fence(); /* the used index is visible before looking whether the driver sleeps */
		q->signalled = used;
		if (q->event_idx) {
			uint16_t event = load16(q->avail + 4 + 2 * (size_t)q->size);
			if ((uint16_t)(used - event - 1) >= (uint16_t)(used - since) && !q->fresh)
				return 0;
		} else if (load16(q->avail) & NO_SIGNAL) {
			return 0;
		}
	}
	q->fresh = 0;
	return 1;
}

/* Returns whether it signalled, -1 if that raised. */
static int notify(Queue *q)
{
	if (!should_notify(q))
		return 0;
	if (q->signal) {
		PyObject *signal = Py_NewRef(q->signal);
		PyObject *result = PyObject_CallNoArgs(signal);
		Py_DECREF(signal);
		if (!result)
			return -1;
		Py_DECREF(result);
	}
	return 1;
}

static int break_queue(Queue *q, PyObject *why)
{
	int result = 0;
	if (why && !q->broken) {
		PyObject *error = PyObject_CallOneArg(RingError, why);
		if (error) {
			q->broken = error;
			result = notify(q);
		}
	}
	Py_XDECREF(why);
	return PyErr_Occurred() || result < 0 ? -1 : 0;
}

static int break_because(Queue *q, const char *why)
{
	if (why == NO_MEMORY) {
		PyErr_NoMemory();
		return -1;
	}
	return break_queue(q, PyUnicode_FromString(why));
}

/* --- giving requests back */

/* Stores of the inflight record stay in the order of the program, in which they are true wherever the process dies. */
static inline void in_order(void)
{
	__atomic_signal_fence(__ATOMIC_SEQ_CST);
}

enum { RECORD_HEAD = 16, RECORD_LAST_HEAD = 12, RECORD_USED_IDX = 14 }; /* of the part; then, of each entry: */
enum { RECORD_ENTRY = 16, RECORD_NEXT = 6, RECORD_COUNTER = 8 };

static char *record_of(Queue *q, uint32_t head)
{
	return (char *)q->record.buf + RECORD_HEAD + RECORD_ENTRY * (size_t)head;
}

static void record_taken(Queue *q, uint32_t head)
{
	char *entry = record_of(q, head);
	memcpy(entry + RECORD_COUNTER, &q->record_counter, 8);
	q->record_counter++;
	in_order();
	__atomic_store_n(entry, 1, __ATOMIC_RELAXED);
	in_order();
}

/* As PackedInflight in packed_inflight.py, which explains it: offsets in the part, and in each of its entries. */
enum { PACKED_HEADS = 12, PACKED_POSITIONS = 16, PACKED_HEAD = 32, PACKED_ENTRY = 32 };
enum { PACKED_STATE = 0, PACKED_COUNTER = 8, PACKED_BUFFER = 16, PACKED_ADDRESS = 24 };

static inline void record32(Queue *q, uint32_t value)
{
	in_order();
	__atomic_store_n((uint32_t *)((char *)q->record.buf + PACKED_HEADS), value, __ATOMIC_RELAXED);
	in_order();
}

static inline void record64(Queue *q, size_t offset, uint64_t value)
{
	in_order();
	__atomic_store_n((uint64_t *)((char *)q->record.buf + offset), value, __ATOMIC_RELAXED);
	in_order();
}

static size_t packed_entry(uint32_t n)
{
	return PACKED_HEAD + PACKED_ENTRY * (size_t)n;
}

static uint64_t positions(uint32_t used, uint32_t used_wrap, uint32_t old, uint32_t old_wrap)
{
	return (uint64_t)used | (uint64_t)old << 16 | (uint64_t)used_wrap << 32 | (uint64_t)old_wrap << 40;
}

/* ``head`` was popped: the ``count`` descriptors in ``table``. Its id, which only the last one has to have, is written
 * with each. */
static void record_taken_packed(Queue *q, uint32_t head, uint32_t count, uint16_t *first, uint16_t *last)
{
	uint32_t index = q->record_free;
	*first = (uint16_t)index;
	for (uint32_t n = 0; n < count; n++) {
		struct desc d;
		memcpy(&d, q->table + 16 * (size_t)n, sizeof d);
		size_t at = packed_entry(index);
		record64(q, at + PACKED_BUFFER, head | (uint64_t)d.four << 16 | (uint64_t)d.len << 32);
		record64(q, at + PACKED_ADDRESS, d.addr);
		*last = (uint16_t)index;
		index = q->links[index];
	}
	size_t at = packed_entry(*first);
	record64(q, at + PACKED_COUNTER, q->record_counter++);
	record64(q, at + PACKED_STATE,
		 1 | (uint64_t)q->links[*first] << 16 | (uint64_t)*last << 32 | (uint64_t)count << 48);
	q->record_free = index;
	record32(q, index | index << 16);
}

/* It is in the ring but for its flags. */
static void record_returning(Queue *q, uint16_t first, uint16_t last, uint32_t count, uint32_t used, uint32_t used_wrap)
{
	uint32_t free = q->record_free;
	q->links[last] = (uint16_t)free;
	if (first == last)
		record64(q, packed_entry(first), 1 | (uint64_t)free << 16 | (uint64_t)last << 32 | (uint64_t)count << 48);
	else
		record64(q, packed_entry(last), (uint64_t)free << 16);
	record32(q, first | free << 16);
	record64(q, PACKED_POSITIONS, positions(used, used_wrap, q->used_idx, q->used_wrap));
	q->record_free = first;
}

/* The flags are written, ``used_idx`` is behind them. */
static void record_returned(Queue *q, uint16_t first)
{
	record64(q, packed_entry(first), (uint64_t)q->links[first] << 16);
	record32(q, first | (uint32_t)first << 16);
	record64(q, PACKED_POSITIONS, positions(q->used_idx, q->used_wrap, q->used_idx, q->used_wrap));
}

/* Give ``head``, of ``count`` descriptors, back to the driver; ``chain`` is what it was, NULL if it was a bad one;
 * ``first`` and ``last`` are its entries in the record of a packed queue. */
static int put_back(Queue *q, uint32_t head, uint32_t count, const Chain *chain, uint16_t first, uint16_t last,
		    uint32_t written)
{
	uint64_t offset;
	q->in_flight--;
	if (q->packed) {
		offset = 16 * (uint64_t)q->used_idx;
		char *at = q->desc + offset;
		uint32_t used = q->used_idx + count, wrap = q->used_wrap;
		if (used >= q->size) {
			used -= q->size;
			wrap ^= 1;
		}
		store32(at + 8, written);
		store16(at + 12, (uint16_t)head);
		if (q->record.obj)
			record_returning(q, first, last, count, used, wrap);
		store16_release(at + 14, (uint16_t)((q->used_wrap ? F_BOTH : 0) | (written ? F_WRITE : 0)));
		q->occupied -= count;
		q->since += count;
		q->used_idx = used;
		q->used_wrap = wrap;
		if (q->record.obj)
			record_returned(q, first);
		return q->mark ? mark(q, chain, offset, 16) : 0;
	}
	offset = 4 + 8 * (uint64_t)(q->used_idx & (q->size - 1));
	char *at = q->used + offset;
	char *record = q->record.obj ? q->record.buf : NULL;
	store32(at, head);
	store32(at + 4, written);
	if (record) {
		in_order();
		memcpy(record_of(q, head) + RECORD_NEXT, record + RECORD_LAST_HEAD, 2);
		in_order();
		store16(record + RECORD_LAST_HEAD, (uint16_t)head);
		in_order();
	}
	q->used_idx = (q->used_idx + 1) & 0xFFFF;
	store16_release(q->used + 2, (uint16_t)q->used_idx);
	if (record) {
		in_order();
		__atomic_store_n(record_of(q, head), 0, __ATOMIC_RELAXED);
		in_order();
		store16(record + RECORD_USED_IDX, (uint16_t)q->used_idx);
		in_order();
	}
	return q->mark && (mark(q, chain, offset, 8) < 0 || mark(q, NULL, 2, 2) < 0) ? -1 : 0;
}

/* Log as written: what the device may have written of ``chain``, and bytes of the used ring. */
static int mark(Queue *q, const Chain *chain, uint64_t offset, uint64_t length)
{
	if (!q->mark)
		return 0; /* the first of two calls ended it */
	PyObject *call = Py_NewRef(q->mark), *base = Py_NewRef(q->log_used), *result;
	int failed = 0;
	for (Py_ssize_t n = chain ? chain->readables : 0; chain && !failed && n < chain->segments; n++) {
		const Segment *s = &chain->segment[n];
		result = PyObject_CallFunction(call, "KK",
					       (unsigned long long)(s->region->guest + (uint64_t)(s->ptr - s->region->ptr)),
					       (unsigned long long)s->len);
		failed = !result;
		Py_XDECREF(result);
	}
	if (!failed && base != Py_None) {
		unsigned long long addr = PyLong_AsUnsignedLongLong(base);
		failed = PyErr_Occurred() != NULL;
		if (!failed) {
			result = PyObject_CallFunction(call, "KK", addr + offset, (unsigned long long)length);
			failed = !result;
			Py_XDECREF(result);
		}
	}
	Py_DECREF(call);
	Py_DECREF(base);
	return failed ? -1 : 0;
}

static int push_number(Queue *q, long long head, PyObject *written_given)
{
	long long written = 0;
	if (written_given) {
		int overflow;
		written = PyLong_AsLongLongAndOverflow(written_given, &overflow); /* -1 if it is too large: will not do */
		if (written == -1 && PyErr_Occurred())
			return -1;
	}
	if (q->stopped) {
		PyErr_SetString(StateError, "push on a stopped queue");
		return -1;
	}
	Chain *chain = head >= 0 && head < heads(q) ? q->held[head] : NULL;
	if (!chain) {
		PyErr_Format(StateError, "head %lld is not in flight", head);
		return -1;
	}
	if (written < 0 || (unsigned long long)written > chain->writable_bytes) {
		PyErr_Format(PyExc_ValueError, "%S bytes written where there is room for %llu", written_given,
			     chain->writable_bytes);
		return -1;
	}
	q->held[head] = NULL;
	int result = put_back(q, (uint32_t)head, chain->entries, chain, chain->first, chain->last,
			      (uint32_t)written);
	Py_DECREF(chain);
	return result;
}

static int push(Queue *q, PyObject *head_given, PyObject *written_given)
{
	int overflow;
	long long head = PyLong_AsLongLongAndOverflow(head_given, &overflow);
	if (head == -1 && PyErr_Occurred())
		return -1;
	return push_number(q, head, written_given);
}

/* --- taking requests */

/* Whether there is something to pop; -1 if breaking the queue raised. */
static int look(Queue *q)
{
	if (q->stopped || q->broken)
		return 0;
	if (q->packed)
		return (load16_acquire(q->desc + 16 * (size_t)q->next + 14) & F_BOTH) == (q->wrap ? F_AVAIL : F_USED);
	uint16_t seen = load16_acquire(q->avail + 2);
	uint16_t waiting = (uint16_t)(seen - q->next);
	if (waiting > q->size)
		return break_because(q, "the available index is further ahead than the ring is long");
	q->seen = seen;
	return waiting > 0;
}

static int some_recovered(Queue *q)
{
	return q->recovered && PyObject_Size(q->recovered) > 0;
}

/* Hold ``head``, which was walked, or could not be for the reason ``why``: 1 and a chain that is the caller's, or it is
 * given back and breaks the queue. */
static int hold(Queue *q, uint32_t head, uint32_t count, uint16_t first, uint16_t last, const char *why, Chain **chain)
{
	q->in_flight++;
	q->occupied += count;
	if (!why) {
		*chain = chain_new(head, count, q->segment, q->readables, q->segments, q->readable_bytes,
				   q->writable_bytes);
		q->held[head] = *chain;
		if (*chain) {
			(*chain)->first = first;
			(*chain)->last = last;
			Py_INCREF(*chain);
			return 1;
		}
		PyErr_Clear();
		why = NO_MEMORY;
	}
	if (put_back(q, head, count, NULL, first, last, 0) < 0)
		return -1;
	return break_because(q, why);
}

/* 1 and a chain, 0 for none, -1 for an exception (of the signal callback). */
static int take_split(Queue *q, Chain **chain)
{
	if (q->next == q->seen) {
		if (some_recovered(q) && !q->stopped && !q->broken) {
			*chain = (Chain *)PyObject_CallMethodNoArgs(q->recovered, str_popleft);
			return *chain ? 1 : -1;
		}
		int some = look(q);
		if (some <= 0)
			return some;
	}
	if (q->stopped || q->broken)
		return 0;
	uint32_t head = load16(q->avail + 4 + 2 * (size_t)(q->next & (q->size - 1)));
	q->next = (q->next + 1) & 0xFFFF;
	if (head >= q->size || q->held[head]) /* its owner is unknown, or will get it back from whoever works on it */
		return break_because(q, "an available head that is outside of the ring or already in flight");
	if (q->record.obj)
		record_taken(q, head);
	return hold(q, head, 0, 0, 0, walk_split(q, head), chain);
}

static int take_packed(Queue *q, Chain **chain)
{
	if (q->stopped || q->broken)
		return 0;
	if (some_recovered(q)) {
		*chain = (Chain *)PyObject_CallMethodNoArgs(q->recovered, str_popleft);
		return *chain ? 1 : -1;
	}
	uint32_t position = q->next, count = 0, room = q->size - q->occupied;
	uint16_t flags = load16_acquire(q->desc + 16 * (size_t)position + 14);
	if ((flags & F_BOTH) != (q->wrap ? F_AVAIL : F_USED))
		return 0;
	struct desc d;
	/* What it consists of is read before it is checked: its id, with which even a bad one is given back, is last. */
	for (;;) {
		if (count++ == room)
			return break_because(q, room ? "a descriptor chain that is too long or a loop"
						     : "more descriptors are available than the ring is long");
		if (16 * (size_t)count > q->table_bytes &&
		    table_room(q, 16 * (size_t)(count < 32 ? 64 : 2 * count)) != NULL)
			return break_because(q, NO_MEMORY);
		load_desc(&d, q->desc + 16 * (size_t)position);
		d.four = flags;
		memcpy(q->table + 16 * (size_t)(count - 1), &d, sizeof d);
		if (++position == q->size)
			position = 0;
		if (!(flags & F_NEXT))
			break;
		flags = load16(q->desc + 16 * (size_t)position + 14);
	}
	if (q->held[d.three])
		return break_because(q, "an id that is already in flight");
	if (q->next + count >= q->size)
		q->wrap ^= 1;
	q->next = position;
	uint16_t first = 0, last = 0;
	if (q->record.obj)
		record_taken_packed(q, d.three, count, &first, &last);
	return hold(q, d.three, count, first, last, walk_packed(q, count), chain);
}

static int take(Queue *q, PyObject **chain)
{
	Chain *taken = NULL;
	int some = q->packed ? take_packed(q, &taken) : take_split(q, &taken);
	*chain = (PyObject *)taken;
	return some;
}

static int disable_notifications(Queue *q)
{
	if (q->stopped)
		return 0;
	if (q->packed) {
		if (q->asking)
			store16(q->used + 2, EVENT_DISABLE);
		q->asking = 0;
	} else if (!q->event_idx) {
		store16(q->used, NO_SIGNAL);
		if (q->mark)
			return mark(q, NULL, 0, 2);
	}
	return 0;
}

static int enable_notifications(Queue *q)
{
	if (q->stopped || q->broken)
		return 0;
	if (some_recovered(q))
		return 1;
	q->asking = 1;
	if (q->packed) {
		if (q->event_idx)
			store16(q->used, (uint16_t)(q->next | q->wrap << 15));
		store16_release(q->used + 2, q->event_idx ? EVENT_DESC : EVENT_ENABLE);
	} else if (q->event_idx) {
		store16(q->used + 4 + 8 * (size_t)q->size, (uint16_t)q->next);
	} else {
		store16(q->used, 0);
	}
	if (q->mark && !q->packed && mark(q, NULL, q->event_idx ? 4 + 8 * (uint64_t)q->size : 0, 2) < 0)
		return -1;
	if (q->stopped)
		return 0;
	full_fence(); /* the driver sees the wish before the ring is looked at again */
	return look(q);
}

/* --- spinning */

static int64_t now_ns(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static inline void relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
	__builtin_ia32_pause();
#elif defined(__aarch64__)
	__asm__ volatile("yield");
#endif
}

/* Look for up to ``us``, without the GIL: what is looked at is held by a buffer of its own meanwhile. */
static int spin(Queue *q, unsigned int us)
{
	int some = look(q);
	if (some || q->stopped || q->broken || !us)
		return some;
	Py_buffer keep;
	if (PyObject_GetBuffer(q->part[q->packed ? 0 : 1].obj, &keep, PyBUF_SIMPLE) < 0)
		return -1;
	const char *word = q->packed ? q->desc + 16 * (size_t)q->next + 14 : q->avail + 2;
	uint16_t mask = q->packed ? F_BOTH : 0xFFFF, before = load16(word) & mask;
	Py_BEGIN_ALLOW_THREADS
	int64_t end = now_ns() + (int64_t)us * 1000;
	for (unsigned int n = 1; (load16(word) & mask) == before; n++) {
		relax();
		if (n % 16 == 0 && now_ns() >= end)
			break;
	}
	Py_END_ALLOW_THREADS
	PyBuffer_Release(&keep);
	return look(q);
}

/* Spin as ``spin_us`` says, less and less often while that is in vain. */
static int spin_adaptively(Queue *q)
{
	if (q->spin_skip) {
		q->spin_skip--;
		return 0;
	}
	int some = spin(q, q->spin_us);
	if (some) {
		q->spin_misses = 0;
	} else {
		if (q->spin_misses < 6)
			q->spin_misses++;
		q->spin_skip = (1u << q->spin_misses) - 2;
	}
	return some;
}

/* --- methods */

static PyObject *queue_pop(Queue *q, PyObject *unused)
{
	PyObject *chain;
	int some = take(q, &chain);
	if (some < 0)
		return NULL;
	if (!some)
		Py_RETURN_NONE;
	return chain;
}

static PyObject *queue_push(Queue *q, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
	static const char *const names[] = {"head", "written"};
	PyObject *given[2];
	if (arguments("push", names, 1, 2, args, nargs, kwnames, given) < 0 || push(q, given[0], given[1]) < 0)
		return NULL;
	Py_RETURN_NONE;
}

static PyObject *truth(int value)
{
	return value < 0 ? NULL : PyBool_FromLong(value);
}

static PyObject *queue_notify(Queue *q, PyObject *unused)
{
	return truth(notify(q));
}

static PyObject *queue_should_notify(Queue *q, PyObject *unused)
{
	return truth(should_notify(q));
}

static PyObject *queue_disable_notifications(Queue *q, PyObject *unused)
{
	if (disable_notifications(q) < 0)
		return NULL;
	Py_RETURN_NONE;
}

static PyObject *queue_enable_notifications(Queue *q, PyObject *unused)
{
	return truth(enable_notifications(q));
}

static PyObject *queue_wait(Queue *q, PyObject *timeout)
{
	unsigned long us = PyLong_AsUnsignedLong(timeout);
	if (us == (unsigned long)-1 && PyErr_Occurred())
		return NULL;
	return truth(spin(q, us > 1000000 ? 1000000 : (unsigned int)us));
}

/* Looks in one drain() that bring something: as in patience.py. */
#define MAX_FINDS 32

/* Serve requests; whether some are left, -1 for an exception. */
static int drain(Queue *q, PyObject *handler, Py_ssize_t budget, Py_ssize_t notify_every)
{
	Py_ssize_t unsignalled = 0;
	int finds = 0;
	if (disable_notifications(q) < 0)
		return -1;
	while (budget > 0) {
		PyObject *chain;
		int some = take(q, &chain);
		if (some < 0)
			return -1;
		if (!some) {
			if (q->spin_us && finds < MAX_FINDS && !q->broken && !q->stopped) {
				unsignalled = 0;
				if (notify(q) < 0)
					return -1;
				some = spin_adaptively(q);
				if (some < 0)
					return -1;
				if (some) {
					finds++;
					continue;
				}
			}
			some = enable_notifications(q);
			if (some <= 0)
				return some;
			if (disable_notifications(q) < 0)
				return -1;
			continue;
		}
		budget--;
		PyObject *written = PyObject_CallOneArg(handler, chain);
		int result = written ? 0 : -1;
		if (written && written != Py_None) {
			if (Py_TYPE(chain) == &ChainType) {
				result = push_number(q, ((Chain *)chain)->head, written);
			} else { /* somebody has put something else into "recovered" */
				PyErr_SetString(PyExc_TypeError, "not a chain of this queue");
				result = -1;
			}
			if (!result && ++unsignalled >= notify_every) {
				unsignalled = 0;
				result = notify(q) < 0 ? -1 : 0;
			}
		}
		Py_XDECREF(written);
		Py_DECREF(chain);
		if (result < 0)
			return -1;
	}
	return enable_notifications(q);
}

static PyObject *queue_drain(Queue *q, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
	static const char *const names[] = {"handler", "budget", "notify_every"};
	PyObject *given[3];
	Py_ssize_t budget = 256, notify_every = 8;
	if (arguments("drain", names, 1, 3, args, nargs, kwnames, given) < 0)
		return NULL;
	if (given[1] && (budget = PyNumber_AsSsize_t(given[1], NULL)) == -1 && PyErr_Occurred())
		return NULL;
	if (given[2] && (notify_every = PyNumber_AsSsize_t(given[2], NULL)) == -1 && PyErr_Occurred())
		return NULL;
	int more = drain(q, given[0], budget, notify_every);
	PyObject *type, *value, *trace;
	PyErr_Fetch(&type, &value, &trace);
	if (notify(q) < 0) {
		Py_XDECREF(type);
		Py_XDECREF(value);
		Py_XDECREF(trace);
		return NULL;
	}
	PyErr_Restore(type, value, trace);
	return truth(more);
}

static unsigned long base_of(const Queue *q)
{
	if (!q->packed)
		return q->next;
	return (unsigned long)q->next | (unsigned long)q->wrap << 15 | (unsigned long)q->used_idx << 16 |
	       (unsigned long)q->used_wrap << 31;
}

static PyObject *queue_stop(Queue *q, PyObject *unused)
{
	if (!q->stopped) {
		if (q->packed && q->record.obj) {
			Py_XSETREF(q->kept, PyBytes_FromStringAndSize(q->record.buf, q->record.len));
			if (!q->kept)
				return NULL;
		}
		q->stopped = 1;
		drop_memory(q); /* the ring may be unmapped from now on */
		drop_record(q);
	}
	return PyLong_FromUnsignedLong(base_of(q));
}

static PyObject *queue_give_up(Queue *q, PyObject *why)
{
	if (break_queue(q, PyObject_Str(why)) < 0)
		return NULL;
	PyObject *base = queue_stop(q, NULL);
	if (!base)
		return NULL;
	Py_DECREF(base);
	Py_RETURN_NONE;
}

static PyObject *queue_adopt(Queue *q, PyObject *other)
{
	Queue *paused = (Queue *)other;
	if (Py_TYPE(other) != Py_TYPE(q) || paused->size != q->size || !paused->stopped) {
		PyErr_SetString(StateError, "only a stopped queue of the same kind and size can be taken over");
		return NULL;
	}
	if (paused == q || q->in_flight) {
		PyErr_SetString(StateError, "only a fresh queue takes another one over");
		return NULL;
	}
	Chain **held = q->held;
	q->held = paused->held;
	paused->held = held;
	q->in_flight = paused->in_flight;
	q->occupied = paused->occupied;
	PyObject *recovered = q->recovered;
	q->recovered = paused->recovered;
	paused->recovered = recovered;
	Py_XSETREF(q->kept, paused->kept);
	paused->kept = NULL;
	paused->in_flight = paused->occupied = 0;
	Py_RETURN_NONE;
}

/* --- what outlives this backend, and this host */

static PyObject *held_heads(Queue *q)
{
	PyObject *list = PyList_New(0);
	for (uint32_t n = 0; list && n < heads(q); n++) {
		if (!q->held[n])
			continue;
		PyObject *head = PyLong_FromUnsignedLong(n);
		if (!head || PyList_Append(list, head) < 0)
			Py_CLEAR(list);
		Py_XDECREF(head);
	}
	return list;
}

/* The private list of free entries of a PackedInflight, which has checked it. */
static int copy_links(Queue *q, PyObject *inflight, uint64_t room)
{
	PyObject *links = PyObject_GetAttrString(inflight, "links");
	PyObject *free = links ? PyObject_GetAttrString(inflight, "free") : NULL;
	Py_buffer view = {.obj = NULL};
	int result = -1;
	if (!free || PyObject_GetBuffer(links, &view, PyBUF_SIMPLE) < 0)
		goto out;
	size_t count = (size_t)view.len / 2;
	unsigned long first = PyLong_AsUnsignedLong(free);
	if (PyErr_Occurred())
		goto out;
	int fits = count >= q->size && count <= MAX_SIZE && first <= count && packed_entry((uint32_t)count) <= room;
	for (size_t n = 0; fits && n < count; n++)
		fits = ((const uint16_t *)view.buf)[n] <= count;
	if (!fits) {
		PyErr_SetString(RingError, "an inflight region that is too small for the ring, or misaligned");
		goto out;
	}
	uint16_t *copy = PyMem_RawMalloc(2 * count);
	if (!copy) {
		PyErr_NoMemory();
		goto out;
	}
	memcpy(copy, view.buf, 2 * count);
	PyMem_RawFree(q->links);
	q->links = copy;
	q->links_count = (uint32_t)count;
	q->record_free = (uint32_t)first;
	result = 0;
out:
	if (view.obj)
		PyBuffer_Release(&view);
	Py_XDECREF(links);
	Py_XDECREF(free);
	return result;
}

static int attach_record(Queue *q, PyObject *inflight)
{
	PyObject *view = PyObject_GetAttrString(inflight, q->packed ? "view" : "flags");
	PyObject *counter = PyObject_GetAttrString(inflight, "_counter");
	Py_buffer record = {.obj = NULL};
	int result = -1;
	if (!view || !counter)
		goto out;
	uint64_t first = PyLong_AsUnsignedLongLongMask(counter);
	if (PyErr_Occurred() || PyObject_GetBuffer(view, &record, PyBUF_WRITABLE) < 0)
		goto out;
	uint64_t need = q->packed ? packed_entry(q->size) : RECORD_HEAD + RECORD_ENTRY * (uint64_t)q->size;
	if ((uint64_t)record.len < need || (uintptr_t)record.buf & 7) {
		PyBuffer_Release(&record);
		PyErr_SetString(RingError, "an inflight region that is too small for the ring, or misaligned");
		goto out;
	}
	drop_record(q);
	if (q->packed && copy_links(q, inflight, (uint64_t)record.len) < 0) {
		PyBuffer_Release(&record);
		goto out;
	}
	q->record = record;
	q->record_counter = first;
	result = 0;
out:
	Py_XDECREF(view);
	Py_XDECREF(counter);
	return result;
}

/* Append what was recovered, or was bad and is given back. */
static int recovered(Queue *q, int some, Chain *chain)
{
	if (some <= 0)
		return some;
	PyObject *result = PyObject_CallMethod(q->recovered, "append", "N", chain);
	Py_XDECREF(result);
	return result ? 0 : -1;
}

static int resume_split(Queue *q, PyObject *inflight)
{
	PyObject *mine = held_heads(q);
	PyObject *result = mine ? PyObject_CallMethod(inflight, "resume", "IIN", q->size, q->used_idx, mine) : NULL;
	Py_XDECREF(result);
	return result ? attach_record(q, inflight) : -1;
}

static int recover_split(Queue *q, PyObject *inflight)
{
	PyObject *result = PyObject_CallMethod(inflight, "recover", "II", q->size, q->used_idx);
	if (!result)
		return -1;
	int before = result != Py_None;
	PyObject *found = before ? PySequence_List(result) : PyList_New(0);
	Py_DECREF(result);
	if (!found)
		return -1;
	Py_ssize_t count = PyList_GET_SIZE(found);
	if (before) {
		if (count > (uint16_t)(load16_acquire(q->avail + 2) - q->used_idx)) {
			PyErr_SetString(RingError, "more requests in flight than were made available");
			goto error;
		}
		q->next = q->seen = (q->used_idx + (uint32_t)count) & 0xFFFF;
	}
	if (attach_record(q, inflight) < 0)
		goto error;
	for (Py_ssize_t n = 0; n < count; n++) {
		unsigned long head = PyLong_AsUnsignedLong(PyList_GET_ITEM(found, n));
		Chain *chain;
		if (PyErr_Occurred())
			goto error;
		if (head >= q->size || q->held[head]) {
			PyErr_SetString(RingError, "an inflight region that refers to a head outside of the ring");
			goto error;
		}
		int some = hold(q, (uint32_t)head, 0, 0, 0, walk_split(q, (uint32_t)head), &chain);
		if (recovered(q, some, chain) < 0)
			goto error;
	}
	Py_DECREF(found);
	return 0;
error:
	Py_DECREF(found);
	return -1;
}

/* One ``Taken``; its descriptors are the item's. */
static int parse_taken(Queue *q, PyObject *item, unsigned int *first, unsigned int *last, unsigned int *head,
		       const char **descriptors, uint32_t *count)
{
	Py_ssize_t bytes;
	if (!PyArg_ParseTuple(item, "IIIy#", first, last, head, descriptors, &bytes))
		return -1;
	*count = (uint32_t)(bytes / 16);
	if (*first >= q->links_count || *last >= q->links_count || *head >= heads(q) || bytes < 16 ||
	    bytes > 16 * (Py_ssize_t)q->size) {
		PyErr_SetString(RingError, "an inflight region with a request that makes no sense");
		return -1;
	}
	return 0;
}

static int resume_packed(Queue *q, PyObject *inflight)
{
	if (!q->kept) {
		PyErr_SetString(RingError, "requests are in flight that were not recorded");
		return -1;
	}
	PyObject *found = PyObject_CallMethod(inflight, "resume", "IO", q->size, q->kept);
	if (!found)
		return -1;
	if (!PyList_Check(found) || attach_record(q, inflight) < 0)
		goto error;
	uint32_t same = PyList_GET_SIZE(found) == q->in_flight;
	for (Py_ssize_t n = 0; same && n < PyList_GET_SIZE(found); n++) {
		unsigned int first, last, head;
		const char *descriptors;
		uint32_t count;
		if (parse_taken(q, PyList_GET_ITEM(found, n), &first, &last, &head, &descriptors, &count) < 0)
			goto error;
		Chain *chain = q->held[head];
		same = chain && chain->entries == count;
		if (same) {
			chain->first = (uint16_t)first;
			chain->last = (uint16_t)last;
		}
	}
	Py_DECREF(found);
	if (same)
		return 0;
	drop_record(q);
	PyErr_SetString(RingError, "an inflight region with other requests than are in flight");
	return -1;
error:
	Py_DECREF(found);
	drop_record(q);
	return -1;
}

static int go_to(Queue *q, unsigned long base)
{
	uint32_t next = base & 0x7FFF, used = base >> 16 & 0x7FFF;
	if (next >= q->size || used >= q->size) {
		PyErr_Format(RingError, "a base of 0x%x for a ring of %u entries", (unsigned int)base, q->size);
		return -1;
	}
	q->next = next;
	q->wrap = base >> 15 & 1;
	q->used_idx = used;
	q->used_wrap = base >> 31 & 1;
	return 0;
}

static int recover_packed(Queue *q, PyObject *inflight)
{
	PyObject *result = PyObject_CallMethod(inflight, "recover", "IkO", q->size, base_of(q), q->part[0].obj);
	PyObject *found;
	unsigned long base;
	if (!result)
		return -1;
	if (attach_record(q, inflight) < 0)
		goto error;
	if (result == Py_None) {
		Py_DECREF(result);
		return 0;
	}
	if (!PyArg_ParseTuple(result, "kO!", &base, &PyList_Type, &found) || go_to(q, base) < 0)
		goto error;
	for (Py_ssize_t n = 0; n < PyList_GET_SIZE(found); n++) {
		unsigned int first, last, head;
		const char *descriptors;
		uint32_t count;
		Chain *chain;
		if (parse_taken(q, PyList_GET_ITEM(found, n), &first, &last, &head, &descriptors, &count) < 0)
			goto error;
		if (q->held[head] || count > q->size - q->occupied) {
			PyErr_SetString(RingError, "an inflight region with more descriptors than the ring is long");
			goto error;
		}
		if (table_room(q, 16 * (size_t)count) != NULL) {
			PyErr_NoMemory();
			goto error;
		}
		memcpy(q->table, descriptors, 16 * (size_t)count);
		int some = hold(q, head, count, (uint16_t)first, (uint16_t)last, walk_packed(q, count), &chain);
		if (recovered(q, some, chain) < 0)
			goto error;
	}
	Py_DECREF(result);
	return 0;
error:
	Py_DECREF(result);
	return -1;
}

static PyObject *queue_track(Queue *q, PyObject *inflight)
{
	if (q->stopped) {
		PyErr_SetString(StateError, "a stopped queue records nothing");
		return NULL;
	}
	if (PyObject_HasAttrString(inflight, "links") != q->packed) {
		PyErr_SetString(StateError, q->packed ? "a packed queue, and a recorder of split ones"
						      : "a split queue, and a recorder of packed ones");
		return NULL;
	}
	int result = q->packed ? q->in_flight ? resume_packed(q, inflight) : recover_packed(q, inflight)
			       : q->in_flight ? resume_split(q, inflight) : recover_split(q, inflight);
	if (result < 0)
		return NULL;
	Py_RETURN_NONE;
}

static PyObject *queue_log_to(Queue *q, PyObject *log)
{
	PyObject *call = NULL, *used = NULL;
	if (log != Py_None) {
		call = PyObject_GetAttrString(log, "mark");
		used = call ? PyObject_GetAttrString(log, "used") : NULL;
		if (!used) {
			Py_XDECREF(call);
			return NULL;
		}
		Py_INCREF(log);
	} else {
		log = NULL;
	}
	Py_XSETREF(q->log, log);
	Py_XSETREF(q->mark, call);
	Py_XSETREF(q->log_used, used);
	Py_RETURN_NONE;
}

static PyObject *queue_in_flight(Queue *q, void *closure)
{
	return PyLong_FromUnsignedLong(q->in_flight);
}

static PyObject *queue_next_base(Queue *q, void *closure)
{
	return PyLong_FromUnsignedLong(base_of(q));
}

static PyMemberDef queue_members[] = {
	{"size", T_UINT, offsetof(Queue, size), READONLY, NULL},
	{"broken", T_OBJECT, offsetof(Queue, broken), READONLY, NULL},
	{"recovered", T_OBJECT_EX, offsetof(Queue, recovered), READONLY, NULL},
	{"stopped", T_BOOL, offsetof(Queue, stopped), READONLY, NULL},
	{"spin_us", T_UINT, offsetof(Queue, spin_us), 0, NULL},
	{NULL},
};

static PyGetSetDef queue_getset[] = {
	{"in_flight", (getter)queue_in_flight, NULL, NULL, NULL},
	{"next_base", (getter)queue_next_base, NULL, NULL, NULL},
	{NULL},
};

#define FAST(function) (PyCFunction)(void (*)(void))function, METH_FASTCALL | METH_KEYWORDS

static PyMethodDef queue_methods[] = {
	{"pop", (PyCFunction)queue_pop, METH_NOARGS, NULL},
	{"push", FAST(queue_push), NULL},
	{"notify", (PyCFunction)queue_notify, METH_NOARGS, NULL},
	{"should_notify", (PyCFunction)queue_should_notify, METH_NOARGS, NULL},
	{"disable_notifications", (PyCFunction)queue_disable_notifications, METH_NOARGS, NULL},
	{"enable_notifications", (PyCFunction)queue_enable_notifications, METH_NOARGS, NULL},
	{"drain", FAST(queue_drain), NULL},
	{"wait", (PyCFunction)queue_wait, METH_O, NULL},
	{"rebind", (PyCFunction)queue_rebind, METH_VARARGS, NULL},
	{"adopt", (PyCFunction)queue_adopt, METH_O, NULL},
	{"give_up", (PyCFunction)queue_give_up, METH_O, NULL},
	{"track", (PyCFunction)queue_track, METH_O, NULL},
	{"log_to", (PyCFunction)queue_log_to, METH_O, NULL},
	{"stop", (PyCFunction)queue_stop, METH_NOARGS, NULL},
	{NULL},
};

#define QUEUE_TYPE(name, doc)                                                                                          \
	{                                                                                                              \
		PyVarObject_HEAD_INIT(NULL, 0)                                                                         \
		.tp_name = "pyvhost.vring._fastqueue." name,                                                           \
		.tp_doc = doc,                                                                                         \
		.tp_basicsize = sizeof(Queue),                                                                         \
		.tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,                                                   \
		.tp_new = queue_new,                                                                                   \
		.tp_dealloc = (destructor)queue_dealloc,                                                               \
		.tp_traverse = (traverseproc)queue_traverse,                                                           \
		.tp_clear = (inquiry)queue_clear,                                                                      \
		.tp_methods = queue_methods,                                                                           \
		.tp_members = queue_members,                                                                           \
		.tp_getset = queue_getset,                                                                             \
	}

static PyTypeObject SplitType = QUEUE_TYPE("SplitDeviceQueue", "As pyvhost.vring.split_device.SplitDeviceQueue.");
static PyTypeObject PackedType = QUEUE_TYPE("PackedDeviceQueue", "As pyvhost.vring.packed_device.PackedDeviceQueue.");

/* --- the module ---------------------------------------------------------------------------------------------- */

static struct PyModuleDef module_def = {
	PyModuleDef_HEAD_INIT,
	.m_name = "pyvhost.vring._fastqueue",
	.m_doc = "The device's side of virtqueues, compiled.",
	.m_size = -1,
};

PyMODINIT_FUNC PyInit__fastqueue(void)
{
	PyObject *errors = PyImport_ImportModule("pyvhost.errors");
	if (!errors)
		return NULL;
	RingError = PyObject_GetAttrString(errors, "RingError");
	StateError = PyObject_GetAttrString(errors, "StateError");
	MemoryFault = PyObject_GetAttrString(errors, "MemoryFault");
	Py_DECREF(errors);
	str_regions = PyUnicode_InternFromString("regions");
	str_guest_addr = PyUnicode_InternFromString("guest_addr");
	str_size = PyUnicode_InternFromString("size");
	str_view = PyUnicode_InternFromString("view");
	str_unpack = PyUnicode_InternFromString("unpack");
	str_popleft = PyUnicode_InternFromString("popleft");
	str_readonly = PyUnicode_InternFromString("readonly");
	PyObject *collections = PyImport_ImportModule("collections");
	if (collections) {
		deque = PyObject_GetAttrString(collections, "deque");
		Py_DECREF(collections);
	}
	if (PyErr_Occurred())
		return NULL;
	if (PyType_Ready(&RegionType) < 0)
		return NULL;
	PyObject *module = PyModule_Create(&module_def);
	if (!module)
		return NULL;
	if (PyModule_AddType(module, &ChainType) < 0 || PyModule_AddType(module, &SplitType) < 0 ||
	    PyModule_AddType(module, &PackedType) < 0) {
		Py_DECREF(module);
		return NULL;
	}
	return module;
}
