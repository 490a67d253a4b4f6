/*
 * The driver's side of `virtio-tee bench`: a vhost-user frontend and a driver for one virtqueue, as lean as C makes
 * it, so that what is measured is the backend. Guest memory is a memfd, kicks and signals are eventfds, the ring is
 * split, with EVENT_IDX and indirect descriptors where the backend has them, and an inflight region likewise.
 *
 *   driver --socket PATH --workload block|invoke|hold [--polling] [--depth N] [--bytes N] [--seconds S] [--cpu N]
 *          [--memory none|inline|registered|temporary] [--func N]
 *   driver --echo CPU …      no socket: a device thread in C, on that CPU, that completes whatever it gets
 *
 * One JSON object on stdout; exit status 1 and a line on stderr if anything is not as it must be.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <linux/virtio_ring.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define RING 128
#define MAX_DEPTH 64
#define SLOT 4096 /* bytes for one request's header, parameters and indirect table */
#define GUEST_BASE 0x100000ull
#define MAX_QUEUES 3
#define MAX_SAMPLES (8u << 20)

static _Noreturn void die(const char *format, ...)
{
	va_list args;

	va_start(args, format);
	fputs("bench driver: ", stderr);
	vfprintf(stderr, format, args);
	fputc('\n', stderr);
	exit(1);
}

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

static void pin(int cpu)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	if (cpu >= 0 && sched_setaffinity(0, sizeof(set), &set))
		die("cannot run on CPU %d: %s", cpu, strerror(errno));
}

/* In a loop that looks at memory. */
static void pause_cpu(void)
{
#if defined(__x86_64__)
	__builtin_ia32_pause();
#elif defined(__aarch64__)
	__asm__ volatile("yield");
#endif
}

/* How long the threads of this process have waited for a CPU that something else had. */
static uint64_t waited_ns(void)
{
	unsigned long long ran, waited, sum = 0;
	struct dirent *entry;
	DIR *tasks = opendir("/proc/self/task");

	while (tasks && (entry = readdir(tasks))) {
		char path[300];
		FILE *file;

		snprintf(path, sizeof(path), "/proc/self/task/%s/schedstat", entry->d_name);
		file = entry->d_name[0] == '.' ? NULL : fopen(path, "r");
		if (file && fscanf(file, "%llu %llu", &ran, &waited) == 2)
			sum += waited;
		if (file)
			fclose(file);
	}
	if (tasks)
		closedir(tasks);
	return sum;
}

/* ---- options */

enum workload { BLOCK, INVOKE, HOLD };
enum memory { NONE, INLINE, REGISTERED, TEMPORARY };

static struct {
	const char *socket;
	enum workload workload;
	enum memory memory;
	bool polling;
	unsigned depth;
	size_t bytes;
	double seconds;
	int cpu, echo;
	uint32_t func;
} opt = { .depth = 1, .seconds = 0.5, .cpu = -1, .echo = -1 };

/* ---- guest memory: the rings, then the slots, then the data of each slot */

static int ram_fd;
static uint8_t *ram;
static size_t ram_size, ram_used;

static uint64_t guest(const void *p)
{
	return GUEST_BASE + (uint64_t)((const uint8_t *)p - ram);
}

static void *take(size_t size, size_t align)
{
	ram_used = (ram_used + align - 1) & ~(align - 1);
	if (ram_used + size > ram_size)
		die("guest memory is full");
	ram_used += size;
	return ram + ram_used - size;
}

static void make_ram(size_t size)
{
	ram_size = (size + (2u << 20)) & ~(size_t)((2u << 20) - 1);
	ram_fd = memfd_create("bench-ram", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	if (ram_fd < 0 || ftruncate(ram_fd, (off_t)ram_size) || fcntl(ram_fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW))
		die("memfd: %s", strerror(errno));
	ram = mmap(NULL, ram_size, PROT_READ | PROT_WRITE, MAP_SHARED, ram_fd, 0);
	if (ram == MAP_FAILED)
		die("mmap: %s", strerror(errno));
	memset(ram, 0, ram_size);
}

/* ---- vhost-user */

enum {
	GET_FEATURES = 1, SET_FEATURES = 2, SET_OWNER = 3, SET_MEM_TABLE = 5, SET_VRING_NUM = 8, SET_VRING_ADDR = 9,
	SET_VRING_BASE = 10, SET_VRING_KICK = 12, SET_VRING_CALL = 13, GET_PROTOCOL_FEATURES = 15,
	SET_PROTOCOL_FEATURES = 16, SET_VRING_ENABLE = 18, GET_CONFIG = 24, GET_INFLIGHT_FD = 31, SET_INFLIGHT_FD = 32,
};

#define F_INDIRECT (1ull << 28)
#define F_EVENT_IDX (1ull << 29)
#define F_PROTOCOL (1ull << 30)
#define F_VERSION_1 (1ull << 32)
#define TEE_F_INLINE (1ull << 0)
#define P_REPLY_ACK (1ull << 3)
#define P_CONFIG (1ull << 9)
#define P_INFLIGHT (1ull << 12)
#define NEED_REPLY 8u

static int sock = -1;
static uint64_t features, protocol;

struct header {
	uint32_t request, flags, size;
};

static void send_message(uint32_t request, const void *payload, uint32_t size, int fd)
{
	char control[CMSG_SPACE(sizeof(int))] = { 0 };
	struct header h = { request, 1, size };
	struct iovec iov[2] = { { &h, sizeof(h) }, { (void *)payload, size } };
	struct msghdr m = { .msg_iov = iov, .msg_iovlen = 2 };

	if (fd >= 0) {
		m.msg_control = control;
		m.msg_controllen = sizeof(control);
		struct cmsghdr *c = CMSG_FIRSTHDR(&m);
		c->cmsg_level = SOL_SOCKET;
		c->cmsg_type = SCM_RIGHTS;
		c->cmsg_len = CMSG_LEN(sizeof(int));
		memcpy(CMSG_DATA(c), &fd, sizeof(int));
	}
	if (sendmsg(sock, &m, MSG_NOSIGNAL) != (ssize_t)(sizeof(h) + size))
		die("message %u could not be sent: %s", request, strerror(errno));
}

/* The reply's payload; a file descriptor that came with it in *fd. */
static void receive(uint32_t request, void *payload, uint32_t size, int *fd)
{
	char control[CMSG_SPACE(sizeof(int))];
	struct header h;
	struct iovec iov = { &h, sizeof(h) };
	struct msghdr m = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof(control) };

	if (recvmsg(sock, &m, MSG_WAITALL | MSG_CMSG_CLOEXEC) != (ssize_t)sizeof(h))
		die("no reply to message %u: the backend left", request);
	if (h.request != request || h.size != size)
		die("to message %u the backend replied with message %u of %u bytes", request, h.request, h.size);
	struct cmsghdr *c = CMSG_FIRSTHDR(&m);
	if (fd && c && c->cmsg_type == SCM_RIGHTS)
		memcpy(fd, CMSG_DATA(c), sizeof(int));
	if (size && recv(sock, payload, size, MSG_WAITALL) != (ssize_t)size)
		die("a reply to message %u that is cut short", request);
}

static uint64_t get_u64(uint32_t request)
{
	uint64_t value;

	send_message(request, NULL, 0, -1);
	receive(request, &value, sizeof(value), NULL);
	return value;
}

static void set_u64(uint32_t request, uint64_t value, int fd)
{
	send_message(request, &value, sizeof(value), fd);
}

static void set_state(uint32_t request, uint32_t index, uint32_t num)
{
	uint32_t state[2] = { index, num };

	send_message(request, state, sizeof(state), -1);
}

/* ---- the ring */

struct queue {
	unsigned index;
	int kick, call;
	struct vring_desc *desc;
	struct vring_avail *avail;
	struct vring_used *used;
	uint16_t next, seen; /* of the available ring; of the used ring */
	uint16_t told;       /* available index at the last look whether to kick */
	uint64_t kicks, sleeps; /* system calls of the driver */
};

static struct queue queues[MAX_QUEUES];

#define EVENT_FROM_DRIVER(q) (*(volatile uint16_t *)&(q)->avail->ring[RING])
#define EVENT_FROM_DEVICE(q) (*(volatile uint16_t *)&(q)->used->ring[RING])

static void make_queue(unsigned index)
{
	struct queue *q = &queues[index];

	q->index = index;
	q->desc = take(RING * sizeof(*q->desc), 4096);
	q->avail = take(6 + 2 * RING, 16);
	q->used = take(6 + 8 * RING, 4096);
	q->kick = eventfd(0, EFD_CLOEXEC);
	q->call = eventfd(0, EFD_CLOEXEC);
	if (q->kick < 0 || q->call < 0)
		die("eventfd: %s", strerror(errno));
}

static void start_queue(struct queue *q)
{
	struct {
		uint32_t index, flags;
		uint64_t desc, used, avail, log;
	} addr = { q->index, 0, (uintptr_t)q->desc, (uintptr_t)q->used, (uintptr_t)q->avail, 0 };

	set_state(SET_VRING_NUM, q->index, RING);
	set_state(SET_VRING_BASE, q->index, 0);
	send_message(SET_VRING_ADDR, &addr, sizeof(addr), -1);
	set_u64(SET_VRING_CALL, q->index, q->call);
	set_u64(SET_VRING_KICK, q->index, q->kick);
	if (features & F_PROTOCOL)
		set_state(SET_VRING_ENABLE, q->index, 1);
}

static void write_eventfd(int fd)
{
	uint64_t one = 1;

	if (write(fd, &one, sizeof(one)) != sizeof(one))
		die("eventfd: %s", strerror(errno));
}

static void kick_if_wanted(struct queue *q)
{
	bool wanted;

	atomic_thread_fence(memory_order_seq_cst);
	if (features & F_EVENT_IDX)
		wanted = (uint16_t)(q->next - EVENT_FROM_DEVICE(q) - 1) < (uint16_t)(q->next - q->told);
	else
		wanted = !(*(volatile uint16_t *)&q->used->flags & VRING_USED_F_NO_NOTIFY);
	q->told = q->next;
	if (wanted) {
		q->kicks++;
		write_eventfd(q->kick);
	}
}

static uint16_t used_index(struct queue *q)
{
	return atomic_load_explicit((_Atomic uint16_t *)&q->used->idx, memory_order_acquire);
}

/* Returns when there is something in the used ring. */
static void wait_used(struct queue *q)
{
	uint64_t count;

	if (opt.polling) {
		/* an event that is half the index space away: no signals */
		EVENT_FROM_DRIVER(q) = (uint16_t)(q->seen + 0x8000);
		q->avail->flags = features & F_EVENT_IDX ? 0 : VRING_AVAIL_F_NO_INTERRUPT;
		while (used_index(q) == q->seen)
			pause_cpu();
		return;
	}
	while (used_index(q) == q->seen) {
		EVENT_FROM_DRIVER(q) = q->seen;
		atomic_thread_fence(memory_order_seq_cst);
		if (used_index(q) != q->seen)
			return;
		q->sleeps++;
		if (read(q->call, &count, sizeof(count)) == sizeof(count))
			continue;
		/* qemu-storage-daemon makes the eventfds it is given non-blocking, for us as well */
		if (errno != EAGAIN || fcntl(q->call, F_SETFL, 0))
			die("eventfd: %s", strerror(errno));
	}
}

/* ---- requests: each slot has one request, which is made available over and over */

struct slot {
	uint8_t *out, *in; /* what the device reads and writes */
	size_t out_size, in_size;
	uint8_t *data; /* opt.bytes of memory */
	struct vring_desc *table;
	unsigned segments;
	uint64_t started;
	unsigned phase; /* of a temporary registration: 0 register, 1 invoke, 2 unregister */
	uint32_t region;
};

static struct slot slots[MAX_DEPTH];

static void segment(struct slot *s, const void *at, size_t size, bool writable)
{
	struct vring_desc *d = &s->table[s->segments];

	if (s->segments)
		d[-1].flags |= VRING_DESC_F_NEXT;
	*d = (struct vring_desc){ guest(at), (uint32_t)size, writable ? VRING_DESC_F_WRITE : 0, (uint16_t)(s->segments + 1) };
	s->segments++;
}

/* Head i belongs to slot i: an indirect table, or descriptors 4 i to 4 i + 3. */
static void submit(struct queue *q, unsigned i)
{
	struct slot *s = &slots[i];
	unsigned head = i;

	if (features & F_INDIRECT) {
		q->desc[i] = (struct vring_desc){ guest(s->table), s->segments * 16, VRING_DESC_F_INDIRECT, 0 };
	} else {
		head = 4 * i;
		if (s->segments > 4 || head + 4 > RING)
			die("without indirect descriptors the ring is too small for this");
		for (unsigned k = 0; k < s->segments; k++) {
			q->desc[head + k] = s->table[k];
			q->desc[head + k].next = (uint16_t)(head + k + 1);
		}
	}
	q->avail->ring[q->next % RING] = (uint16_t)head;
	q->next++;
	atomic_store_explicit((_Atomic uint16_t *)&q->avail->idx, q->next, memory_order_release);
}

static unsigned slot_of(uint32_t head)
{
	unsigned i = features & F_INDIRECT ? head : head / 4;

	if (i >= MAX_DEPTH)
		die("the device returned head %u", head);
	return i;
}

/* ---- block requests */

static void prepare_block(struct slot *s)
{
	uint32_t read_type = 0;

	s->out_size = 16;
	memset(s->out, 0, 16);
	memcpy(s->out, &read_type, 4);
	s->in_size = 1;
	s->segments = 0;
	segment(s, s->out, 16, false);
	if (opt.bytes)
		segment(s, s->data, opt.bytes, true);
	segment(s, s->in, 1, true);
}

/* ---- TEE requests, as docs/specification.md has them */

static const uint8_t probe_uuid[16] = {
	0x3f, 0x0c, 0x8d, 0x2e, 0x6a, 0x51, 0x4b, 0x7c, 0x9d, 0x14, 0x8e, 0x2b, 0x7a, 0x90, 0xc5, 0xf6,
};

enum { OPEN_CONTEXT = 1, OPEN_SESSION = 0x10, TEE_INVOKE = 0x12, REGISTER = 0x20, UNREGISTER = 0x22 };

#define MEMREF_INOUT 7
#define VALUE_INOUT 3
#define PARAM_INLINE 0x10000

static uint64_t epoch, tag;
static uint32_t context, session;

static uint8_t *put32(uint8_t *p, uint32_t v)
{
	memcpy(p, &v, 4);
	return p + 4;
}

static uint8_t *put64(uint8_t *p, uint64_t v)
{
	memcpy(p, &v, 8);
	return p + 8;
}

static uint8_t *request(struct slot *s, uint32_t type)
{
	uint8_t *p = s->out;

	p = put32(p, type);
	p = put32(p, 0);
	p = put64(p, epoch);
	p = put64(p, ++tag);
	p = put32(p, context);
	return put32(p, 0);
}

static uint8_t *param(uint8_t *p, uint64_t attr, uint64_t a, uint64_t b, uint64_t c)
{
	return put64(put64(put64(put64(p, attr), a), b), c);
}

/* The request ends at `end`; its response has `in_size` bytes. */
static void requested(struct slot *s, uint8_t *end, size_t in_size)
{
	s->out_size = (size_t)(end - s->out);
	s->in_size = in_size;
	s->segments = 0;
	segment(s, s->out, s->out_size, false);
}

static void prepare_register(struct slot *s)
{
	uint8_t *p = request(s, REGISTER);

	p = put64(put32(put32(p, 0), 1), opt.bytes);
	requested(s, put64(put64(p, guest(s->data)), opt.bytes), 24);
	segment(s, s->in, s->in_size, true);
}

static void prepare_unregister(struct slot *s)
{
	requested(s, put32(put32(request(s, UNREGISTER), s->region), 0), 16);
	segment(s, s->in, s->in_size, true);
}

static void prepare_invoke(struct slot *s, uint32_t func, const uint64_t *value)
{
	unsigned count = (opt.memory != NONE) + (value != NULL);
	uint8_t *p = request(s, TEE_INVOKE);

	p = put32(put32(put32(put32(p, session), func), count), 0);
	if (opt.memory == INLINE)
		p = param(p, MEMREF_INOUT | PARAM_INLINE, 0, opt.bytes, 0);
	else if (opt.memory != NONE)
		p = param(p, MEMREF_INOUT, 0, opt.bytes, s->region);
	if (value)
		p = param(p, VALUE_INOUT, *value, 0, 0);
	requested(s, p, 24 + 32 * count);
	if (opt.memory == INLINE)
		segment(s, s->data, opt.bytes, false);
	segment(s, s->in, s->in_size, true);
	if (opt.memory == INLINE)
		segment(s, s->data, opt.bytes, true);
}

static uint32_t answer(const struct slot *s, size_t offset)
{
	uint32_t value;

	memcpy(&value, s->in + offset, 4);
	return value;
}

static void check_answer(const struct slot *s)
{
	if (opt.workload == BLOCK) {
		if (s->in[0])
			die("a block request ended with status %u", s->in[0]);
	} else if (answer(s, 0) || answer(s, 8)) {
		die("a TEE request ended with status %u, result %#x, origin %u", answer(s, 0), answer(s, 8), answer(s, 12));
	}
}

/* One request to its end. */
static void call(struct queue *q, unsigned i)
{
	submit(q, i);
	kick_if_wanted(q);
	wait_used(q);
	if (slot_of(q->used->ring[q->seen % RING].id) != i)
		die("the device returned another request");
	q->seen++;
	check_answer(&slots[i]);
}

static void prepare(struct slot *s)
{
	if (opt.workload == BLOCK)
		prepare_block(s);
	else if (opt.memory == TEMPORARY && s->phase == 0)
		prepare_register(s);
	else if (opt.memory == TEMPORARY && s->phase == 2)
		prepare_unregister(s);
	else
		prepare_invoke(s, opt.func, NULL);
}

static void open_session(struct queue *q)
{
	struct slot *s = &slots[0];
	uint8_t *p = put64(request(s, OPEN_CONTEXT), 0);

	requested(s, p, 24);
	segment(s, s->in, s->in_size, true);
	call(q, 0);
	context = answer(s, 16);
	p = request(s, OPEN_SESSION);
	memcpy(p, probe_uuid, 16);
	memset(p + 16, 0, 16);
	requested(s, put32(put32(p + 32, 0), 0), 24);
	segment(s, s->in, s->in_size, true);
	call(q, 0);
	session = answer(s, 16);
	if (opt.memory != REGISTERED)
		return;
	for (unsigned i = 0; i < opt.depth; i++) {
		prepare_register(&slots[i]);
		call(q, i);
		slots[i].region = answer(&slots[i], 16);
	}
}

/* ---- measuring */

static uint32_t *samples;
static size_t sample_count;
static uint64_t completed, all, ended_at, began_at, waited_before; /* all: also those while it got warm */

static void measure(struct queue *q)
{
	uint64_t warm = now_ns() + (uint64_t)(opt.seconds * 0.15e9), end = 0, now = now_ns();
	unsigned busy = 0;

	for (unsigned i = 0; i < opt.depth; i++) {
		prepare(&slots[i]);
		slots[i].started = now;
		submit(q, i);
		busy++;
	}
	kick_if_wanted(q);
	while (busy) {
		wait_used(q);
		uint16_t until = used_index(q);
		now = now_ns();
		if (!end && now >= warm) {
			began_at = now;
			waited_before = waited_ns();
			end = now + (uint64_t)(opt.seconds * 1e9);
		}
		while (q->seen != until) {
			unsigned i = slot_of(q->used->ring[q->seen % RING].id);
			struct slot *s = &slots[i];

			q->seen++;
			check_answer(s);
			if (opt.memory == TEMPORARY && s->phase < 2) {
				if (s->phase == 0)
					s->region = answer(s, 16);
				s->phase++;
				prepare(s);
				submit(q, i);
				continue;
			}
			all++;
			if (end && s->started >= began_at) {
				completed++;
				if (sample_count < MAX_SAMPLES)
					samples[sample_count++] = (uint32_t)(now - s->started);
			}
			if (end && now >= end) {
				busy--;
				if (!ended_at)
					ended_at = now;
				continue;
			}
			s->phase = 0;
			if (opt.workload != BLOCK) {
				if (opt.memory == TEMPORARY)
					prepare(s);
				else
					put64(s->out + 16, ++tag);
			}
			s->started = now;
			submit(q, i);
		}
		kick_if_wanted(q);
	}
}

static int by_size(const void *a, const void *b)
{
	uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

	return (x > y) - (x < y);
}

static void report(struct queue *q)
{
	qsort(samples, sample_count, sizeof(*samples), by_size);
	if (!sample_count)
		die("nothing was completed in time");
	printf("{\"p50_us\": %.3f, \"p99_us\": %.3f, \"kreq_s\": %.3f, \"requests\": %llu, \"all_requests\": %llu, ",
	       samples[sample_count / 2] / 1e3, samples[sample_count * 99 / 100] / 1e3,
	       (double)completed / ((double)(ended_at - began_at) / 1e6), (unsigned long long)completed,
	       (unsigned long long)all);
	printf("\"kicks\": %.4f, \"sleeps\": %.4f, \"waited\": %.4f, ", (double)q->kicks / (double)all,
	       (double)q->sleeps / (double)all, (double)(waited_ns() - waited_before) / (double)(ended_at - began_at));
	printf("\"event_idx\": %s, \"indirect\": %s, \"inflight\": %s}\n", features & F_EVENT_IDX ? "true" : "false",
	       features & F_INDIRECT ? "true" : "false", protocol & P_INFLIGHT ? "true" : "false");
}

/* A byte that the driver writes while the TA holds the memory: the TA says what it saw before and after. */
static void hold(struct queue *q)
{
	struct slot *s = &slots[0];
	uint64_t milliseconds = 200, before, after;

	s->data[0] = 1;
	prepare_invoke(s, 8, &milliseconds);
	submit(q, 0);
	kick_if_wanted(q);
	usleep(100000);
	if (used_index(q) != q->seen)
		die("HOLD ended at once");
	*(volatile uint8_t *)s->data = 2;
	wait_used(q);
	q->seen++;
	check_answer(s);
	memcpy(&before, s->in + 24 + 32 + 8, 8);
	memcpy(&after, s->in + 24 + 32 + 16, 8);
	printf("{\"before\": %llu, \"after\": %llu}\n", (unsigned long long)before, (unsigned long long)after);
}

/* ---- the device thread of --echo: the driver's own ceiling */

/* It does what no backend can do without, and nothing else: it looks at the ring without a pause, so that it needs no
 * kicks, gives back what is there as it is, and signals where the driver asked for it. */
static void *echo(void *argument)
{
	struct queue *q = argument;
	uint16_t used = 0, told = 0, until;

	pin(opt.echo);
	for (;;) {
		EVENT_FROM_DEVICE(q) = (uint16_t)(used + 0x8000); /* half the index space away: no kicks */
		while ((until = atomic_load_explicit((_Atomic uint16_t *)&q->avail->idx, memory_order_acquire)) == used)
			pause_cpu();
		for (; used != until; used++) {
			q->used->ring[used % RING].id = q->avail->ring[used % RING];
			q->used->ring[used % RING].len = 1;
		}
		atomic_store_explicit((_Atomic uint16_t *)&q->used->idx, used, memory_order_release);
		atomic_thread_fence(memory_order_seq_cst);
		if ((uint16_t)(used - EVENT_FROM_DRIVER(q) - 1) < (uint16_t)(used - told))
			write_eventfd(q->call);
		told = used;
	}
	return NULL;
}

/* ---- set-up */

static void connect_socket(void)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };

	if (strlen(opt.socket) >= sizeof(address.sun_path))
		die("%s is too long for a socket", opt.socket);
	strcpy(address.sun_path, opt.socket);
	sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (connect(sock, (struct sockaddr *)&address, sizeof(address)))
		die("%s: %s", opt.socket, strerror(errno));
}

static void set_inflight(unsigned num_queues)
{
	struct inflight {
		uint64_t size, offset;
		uint16_t num_queues, queue_size;
	} __attribute__((packed)) data = { 0, 0, (uint16_t)num_queues, RING };
	int fd = -1;

	send_message(GET_INFLIGHT_FD, &data, sizeof(data), -1);
	receive(GET_INFLIGHT_FD, &data, sizeof(data), &fd);
	if (fd < 0)
		die("no file descriptor came with the inflight region");
	data.num_queues = (uint16_t)num_queues;
	data.queue_size = RING;
	send_message(SET_INFLIGHT_FD, &data, sizeof(data), fd);
	close(fd);
}

static void set_up(unsigned num_queues)
{
	uint64_t offered, wanted = F_VERSION_1 | F_EVENT_IDX | F_INDIRECT | F_PROTOCOL;
	struct {
		uint32_t num, padding;
		uint64_t guest, size, user, offset;
	} table = { 1, 0, GUEST_BASE, ram_size, (uintptr_t)ram, 0 };

	connect_socket();
	send_message(SET_OWNER, NULL, 0, -1);
	if (opt.workload != BLOCK)
		wanted |= TEE_F_INLINE;
	offered = get_u64(GET_FEATURES);
	features = offered & wanted;
	if (!(features & F_VERSION_1))
		die("the backend has no VERSION_1");
	if (features & F_PROTOCOL) {
		protocol = get_u64(GET_PROTOCOL_FEATURES) & (P_CONFIG | P_INFLIGHT);
		set_u64(SET_PROTOCOL_FEATURES, protocol, -1);
	}
	if (opt.workload != BLOCK) {
		struct {
			uint32_t offset, size, flags;
			uint8_t data[128];
		} config = { 0, 128, 0, { 0 } };

		if (!(protocol & P_CONFIG))
			die("the backend has no config space");
		send_message(GET_CONFIG, &config, sizeof(config), -1);
		receive(GET_CONFIG, &config, sizeof(config), NULL);
		if (memcmp(config.data, "VTEE", 4))
			die("the backend is no TEE device");
		memcpy(&epoch, config.data + 8, 8);
	}
	set_u64(SET_FEATURES, features, -1);
	if (protocol & P_INFLIGHT)
		set_inflight(num_queues);
	send_message(SET_MEM_TABLE, &table, sizeof(table), ram_fd);
	for (unsigned i = 0; i < num_queues; i++)
		start_queue(&queues[i]);
}

static void on_alarm(int number)
{
	static const char text[] = "bench driver: the backend does not answer any more\n";

	(void)number;
	if (write(2, text, sizeof(text) - 1))
		_exit(1);
	_exit(1);
}

static int choice(const char *text, const char *const *names)
{
	for (int i = 0; names[i]; i++)
		if (!strcmp(text, names[i]))
			return i;
	die("unknown word %s", text);
}

int main(int argc, char **argv)
{
	static const char *const workloads[] = { "block", "invoke", "hold", NULL };
	static const char *const memories[] = { "none", "inline", "registered", "temporary", NULL };
	static const struct option options[] = {
		{ "socket", 1, 0, 's' }, { "workload", 1, 0, 'w' }, { "memory", 1, 0, 'm' }, { "polling", 0, 0, 'p' },
		{ "depth", 1, 0, 'd' }, { "bytes", 1, 0, 'b' }, { "seconds", 1, 0, 't' }, { "cpu", 1, 0, 'c' },
		{ "echo", 1, 0, 'e' }, { "func", 1, 0, 'f' }, { 0 },
	};
	int o;

	while ((o = getopt_long(argc, argv, "", options, NULL)) != -1) {
		switch (o) {
		case 's': opt.socket = optarg; break;
		case 'w': opt.workload = (enum workload)choice(optarg, workloads); break;
		case 'm': opt.memory = (enum memory)choice(optarg, memories); break;
		case 'p': opt.polling = true; break;
		case 'd': opt.depth = (unsigned)strtoul(optarg, NULL, 0); break;
		case 'b': opt.bytes = strtoull(optarg, NULL, 0); break;
		case 't': opt.seconds = strtod(optarg, NULL); break;
		case 'c': opt.cpu = atoi(optarg); break;
		case 'e': opt.echo = atoi(optarg); break;
		case 'f': opt.func = (uint32_t)strtoul(optarg, NULL, 0); break;
		default: return 2;
		}
	}
	if (!opt.socket == (opt.echo < 0) || !opt.depth || opt.depth > MAX_DEPTH)
		die("--socket PATH or --echo CPU; --depth 1 to %d", MAX_DEPTH);
	if (opt.echo >= 0 && opt.workload != BLOCK)
		die("--echo goes with --workload block");
	/* a backend that hangs ends the measurement, not the bench */
	signal(SIGALRM, on_alarm);
	alarm((unsigned)(opt.seconds * 4) + 10);
	pin(opt.cpu);

	unsigned num_queues = opt.workload == BLOCK ? 1 : 3;
	size_t data = (opt.bytes + 4095) & ~(size_t)4095;
	make_ram(num_queues * 32768 + opt.depth * (3 * SLOT + data) + 65536);
	for (unsigned i = 0; i < num_queues; i++)
		make_queue(i);
	for (unsigned i = 0; i < opt.depth; i++) {
		slots[i].table = take(256, 16);
		slots[i].out = take(SLOT, 64);
		slots[i].in = take(SLOT, 64);
		slots[i].data = take(data, 4096);
	}
	samples = malloc(MAX_SAMPLES * sizeof(*samples));
	if (!samples)
		die("no memory for the samples");

	struct queue *q = &queues[num_queues - 1];
	if (opt.echo >= 0) {
		pthread_t thread;

		features = F_VERSION_1 | F_EVENT_IDX | F_INDIRECT;
		if (pthread_create(&thread, NULL, echo, q))
			die("no thread");
	} else {
		set_up(num_queues);
	}
	if (opt.workload != BLOCK)
		open_session(q);
	if (opt.workload == HOLD) {
		hold(q);
	} else {
		measure(q);
		report(q);
	}
	return 0;
}
