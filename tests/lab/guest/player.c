// SPDX-License-Identifier: GPL-2.0-only
/*
 * Plays programs of system calls on /dev/tee0 and /dev/teepriv0 (tests/lab/tee_programs.py makes
 * them): each in a process of its own with one or two threads, which gets a signal and is killed
 * when its time is up. Beside them, this process has a session and memory that nobody may touch.
 *
 *     player FILE [UID [bystander]]
 *
 * The last line is JSON: how many ended by themselves and how many were killed, and what came of
 * the system calls.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/tee.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define SLOTS 8
#define BYSTANDER (SLOTS - 1) /* whose ids are in the last place */
#define PAGE 4096
#define ARENA (64 * PAGE)
#define ROOM 8192
#define ERRNOS 192
#define DIES_WITHIN 20 /* seconds */

enum { OPEN, CLOSE, IOCTL, CLOSE_SHM, MAP_SHM, UNMAP, PAUSE };
enum { PLAIN, READ_ONLY, EDGE, RAW }; /* where an argument is: half behind the edge nothing is */
enum { PATCH_ROOM, PATCH_READ_ONLY, PATCH_EDGE, PATCH_ARENA, PATCH_SESSION, PATCH_SHM,
       PATCH_WORD };

struct program {
	uint32_t bytes; /* of both threads' steps */
	uint32_t first; /* of them, the first thread's */
	uint32_t signal_us, kill_us;
} __attribute__((packed));

struct step {
	uint8_t kind, slot, place, patches;
	uint32_t command; /* of an ioctl; else a number */
	uint16_t repeat, arg, room;
	uint8_t answers; /* with the parameters that were received last */
	uint8_t unused;
} __attribute__((packed));

struct patch {
	uint8_t in_room, kind;
	uint16_t offset;
	uint32_t number;
} __attribute__((packed));

struct counts {
	uint32_t errnos[16][ERRNOS]; /* by the ioctl's number */
};

static struct counts *counts;
static int fds[SLOTS], shm_fds[SLOTS], shm_ids[SLOTS];
static uint32_t sessions[SLOTS], next_session, next_shm;
static uint8_t *arena, *read_only;
static uint8_t received[ROOM];
static size_t received_size;
static pthread_barrier_t barrier;

struct part {
	const uint8_t *steps;
	size_t size;
};


static int count(uint32_t command, int rc)
{
	int error = rc < 0 ? errno : 0;

	if ((command >> 8 & 0xff) == 0xa4 && (command & 0xff) < 16 && error < ERRNOS)
		__atomic_add_fetch(&counts->errnos[command & 0xff][error], 1, __ATOMIC_RELAXED);
	return rc;
}

static void remember(uint32_t command, int rc, const uint8_t *arg, const uint8_t *room,
		     size_t room_size)
{
	uint32_t slot;

	if (rc < 0)
		return;
	switch (command) {
	case TEE_IOC_SHM_ALLOC:
	case TEE_IOC_SHM_REGISTER:
		slot = __atomic_fetch_add(&next_shm, 1, __ATOMIC_RELAXED) % BYSTANDER;
		if (shm_fds[slot] >= 0)
			close(shm_fds[slot]);
		shm_fds[slot] = rc;
		memcpy(&shm_ids[slot], arg + 20, 4);
		break;
	case TEE_IOC_OPEN_SESSION:
		slot = __atomic_fetch_add(&next_session, 1, __ATOMIC_RELAXED) % BYSTANDER;
		memcpy(&sessions[slot], room + offsetof(struct tee_ioctl_open_session_arg, session), 4);
		break;
	case TEE_IOC_SUPPL_RECV:
		memcpy(received, room, room_size);
		received_size = room_size;
		break;
	}
}

static void apply(const struct patch *patch, uint8_t *where, size_t size, uint8_t *rooms[3])
{
	uint64_t value = 0;
	size_t width = 8;

	switch (patch->kind) {
	case PATCH_ROOM:
	case PATCH_READ_ONLY:
	case PATCH_EDGE:
		value = (uintptr_t)rooms[patch->kind];
		break;
	case PATCH_ARENA:
		value = (uintptr_t)arena + patch->number;
		break;
	case PATCH_SESSION:
		value = sessions[patch->number % SLOTS];
		width = 4;
		break;
	case PATCH_SHM:
		value = (int64_t)shm_ids[patch->number % SLOTS];
		break;
	case PATCH_WORD:
		value = patch->number;
		break;
	}
	if (patch->offset + width <= size)
		memcpy(where + patch->offset, &value, width);
}

static int fd_of(uint8_t slot)
{
	return slot < SLOTS ? fds[slot] : shm_fds[slot % SLOTS];
}

static void answer(uint8_t *arg, uint8_t *room, size_t size)
{
	uint64_t used;
	uint32_t count;

	memcpy(&count, received + 4, sizeof(count));
	used = 8 + (uint64_t)count * sizeof(struct tee_ioctl_param);
	if (used > size || used > received_size)
		return;
	memcpy(room + 4, received + 4, used - 4);
	memcpy(arg + 8, &used, sizeof(used));
}

static void do_ioctl(const struct step *step, const struct patch *patch, const uint8_t *arg_bytes,
		     const uint8_t *room_bytes, int second)
{
	uint8_t *shared = second ? arena + 4 * ROOM : arena;
	uint8_t *alias = second ? read_only + 4 * ROOM : read_only;
	uint8_t arg[ROOM], room[ROOM];
	uint8_t *rooms[3] = { shared, alias, arena + ARENA - step->room / 2 };
	unsigned long where;
	int i, rc;

	memcpy(arg, arg_bytes, step->arg);
	memcpy(room, room_bytes, step->room);
	if (step->answers)
		answer(arg, room, step->room);
	for (i = 0; i < step->patches; i++) {
		if (patch[i].in_room)
			apply(&patch[i], room, step->room, rooms);
		else
			apply(&patch[i], arg, step->arg, rooms);
	}
	memcpy(shared, room, step->room);
	memcpy(rooms[2], room, step->room / 2);
	where = (uintptr_t)shared + ROOM;
	if (step->place == READ_ONLY)
		where = (uintptr_t)alias + ROOM;
	memcpy(shared + ROOM, arg, step->arg);
	if (step->place == EDGE) {
		where = (uintptr_t)arena + ARENA - step->arg / 2;
		memcpy((void *)where, arg, step->arg / 2);
	} else if (step->place >= RAW) {
		memcpy(&where, arg, sizeof(where));
	}
	for (i = 0; i < step->repeat; i++) {
		rc = count(step->command, ioctl(fd_of(step->slot), step->command, where));
		remember(step->command, rc, shared + ROOM, shared, step->room);
	}
}

static void touch_shm(int fd, uint32_t size)
{
	uint8_t *data = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

	if (data == MAP_FAILED)
		return;
	for (uint32_t at = 0; at < size; at += PAGE)
		data[at]++;
	munmap(data, size);
}

static void do_step(const struct step *step, const struct patch *patches, int second)
{
	const uint8_t *arg = (const uint8_t *)(patches + step->patches);
	int slot = step->slot % SLOTS;

	switch (step->kind) {
	case OPEN:
		if (fds[slot] >= 0)
			close(fds[slot]);
		fds[slot] = open(step->command ? "/dev/teepriv0" : "/dev/tee0", O_RDWR);
		break;
	case CLOSE:
		if (fds[slot] >= 0)
			close(fds[slot]);
		fds[slot] = -1;
		break;
	case IOCTL:
		do_ioctl(step, patches, arg, arg + step->arg, second);
		break;
	case CLOSE_SHM:
		if (slot != BYSTANDER && shm_fds[slot] >= 0) {
			close(shm_fds[slot]);
			shm_fds[slot] = -1;
		}
		break;
	case MAP_SHM:
		if (slot != BYSTANDER)
			touch_shm(shm_fds[slot], step->command);
		break;
	case UNMAP: /* memory that may be registered; there is other memory then */
		mmap(arena + ARENA / 2, ARENA / 4, PROT_READ | PROT_WRITE,
		     MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
		break;
	case PAUSE:
		usleep(step->command);
		break;
	}
}

static void play_part(const struct part *part, int second)
{
	const uint8_t *at = part->steps, *end = at + part->size;
	const struct patch *patches;
	struct step step;

	while (at < end) {
		memcpy(&step, at, sizeof(step));
		patches = (const struct patch *)(at + sizeof(step));
		if (step.arg > ROOM || step.room > ROOM)
			abort();
		do_step(&step, patches, second);
		at += sizeof(step) + step.patches * sizeof(*patches) + step.arg + step.room;
	}
}

static void *play_second(void *part)
{
	pthread_barrier_wait(&barrier);
	play_part(part, 1);
	return NULL;
}

static void ignore(int number)
{
}

static void make_arena(void)
{
	int fd = memfd_create("arena", 0);

	if (fd < 0 || ftruncate(fd, ARENA))
		abort();
	/* Nothing is behind it. */
	arena = mmap(NULL, ARENA + PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	mmap(arena, ARENA, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0);
	read_only = mmap(NULL, ARENA, PROT_READ, MAP_SHARED, fd, 0);
	close(fd);
}

static void play(const struct program *program, unsigned int uid)
{
	const uint8_t *steps = (const uint8_t *)(program + 1);
	struct part first = { steps, program->first };
	struct part second = { steps + program->first, program->bytes - program->first };
	struct sigaction action = { .sa_handler = ignore };
	pthread_t thread;
	int i;

	sigaction(SIGUSR1, &action, NULL);
	if (uid && (setgroups(0, NULL) || setgid(uid) || setuid(uid)))
		abort();
	make_arena();
	for (i = 0; i < SLOTS; i++) {
		fds[i] = -1;
		if (i != BYSTANDER)
			shm_fds[i] = shm_ids[i] = -1;
	}
	fds[0] = open("/dev/tee0", O_RDWR);
	if (!second.size) {
		play_part(&first, 0);
		_exit(0);
	}
	pthread_barrier_init(&barrier, NULL, 2);
	pthread_create(&thread, NULL, play_second, &second);
	pthread_barrier_wait(&barrier);
	play_part(&first, 0);
	pthread_join(thread, NULL);
	_exit(0);
}

/* -- who is beside them */

static int bystander = -1;
static uint8_t *bystander_data;

static const uint8_t probe[16] = { 0x3f, 0x0c, 0x8d, 0x2e, 0x6a, 0x51, 0x4b, 0x7c,
				   0x9d, 0x14, 0x8e, 0x2b, 0x7a, 0x90, 0xc5, 0xf6 };

static void fail(const char *what, int number)
{
	printf("%s (program %d, errno %d)\n", what, number, errno);
	exit(1);
}

static void open_bystander(void)
{
	struct tee_ioctl_open_session_arg open_arg = { 0 };
	struct tee_ioctl_buf_data buffer = { (uintptr_t)&open_arg, sizeof(open_arg) };
	struct tee_ioctl_shm_alloc_data alloc = { .size = PAGE };

	bystander = open("/dev/tee0", O_RDWR | O_CLOEXEC);
	memcpy(open_arg.uuid, probe, sizeof(probe));
	if (ioctl(bystander, TEE_IOC_OPEN_SESSION, &buffer) || open_arg.ret)
		fail("the bystander has no session", -1);
	sessions[BYSTANDER] = open_arg.session;
	shm_fds[BYSTANDER] = ioctl(bystander, TEE_IOC_SHM_ALLOC, &alloc);
	shm_ids[BYSTANDER] = alloc.id;
	bystander_data = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, shm_fds[BYSTANDER], 0);
	if (shm_fds[BYSTANDER] < 0 || bystander_data == MAP_FAILED)
		fail("the bystander has no memory", -1);
	memset(bystander_data, 0x5a, PAGE);
}

/* Its memory is as it was, and its TA serves it. */
static void check_bystander(int number)
{
	struct {
		struct tee_ioctl_invoke_arg arg;
		struct tee_ioctl_param params[2];
	} invoke = {
		.arg = { .func = 2, .session = sessions[BYSTANDER], .num_params = 2 },
		.params = { { TEE_IOCTL_PARAM_ATTR_TYPE_MEMREF_INOUT, 0, PAGE, shm_ids[BYSTANDER] },
			    { TEE_IOCTL_PARAM_ATTR_TYPE_VALUE_INPUT, 0xff, 0, 0 } },
	};
	struct tee_ioctl_buf_data buffer = { (uintptr_t)&invoke, sizeof(invoke) };

	for (int turn = 0; turn < 2; turn++) {
		for (int i = 0; i < PAGE; i++)
			if (bystander_data[i] != (turn ? 0xa5 : 0x5a))
				fail("the bystander's memory has changed", number);
		if (ioctl(bystander, TEE_IOC_INVOKE, &buffer) || invoke.arg.ret)
			fail("the bystander's session has gone", number);
	}
}

/* -- all of them */

static uint64_t now_us(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000ULL + now.tv_nsec / 1000;
}

/* Returns whether it had to be killed. */
static int run(const struct program *program, unsigned int uid, int number)
{
	uint64_t began, passed;
	int signalled = 0, killed = 0;
	pid_t child;

	began = now_us();
	child = fork();
	if (!child)
		play(program, uid);
	if (child < 0)
		fail("there is no process for it", number);
	while (!waitpid(child, NULL, WNOHANG)) {
		passed = now_us() - began;
		if (program->signal_us && !signalled && passed >= program->signal_us)
			signalled = !kill(child, SIGUSR1);
		if (!killed && passed >= program->kill_us)
			killed = !kill(child, SIGKILL);
		if (passed > DIES_WITHIN * 1000000ULL)
			fail("it cannot be killed", number);
		usleep(200);
	}
	return killed;
}

static const uint8_t *read_file(const char *path, size_t *size)
{
	int fd = open(path, O_RDONLY);
	struct stat about;
	void *data;

	if (fd < 0 || fstat(fd, &about))
		fail("there is no file", -1);
	*size = about.st_size;
	data = mmap(NULL, *size, PROT_READ, MAP_PRIVATE, fd, 0);
	close(fd);
	return data;
}

int main(int argc, char **argv)
{
	unsigned int uid = argc > 2 ? strtoul(argv[2], NULL, 0) : 0;
	int i, k, number, killed = 0;
	const uint8_t *at, *end;
	struct program program;
	size_t size;

	counts = mmap(NULL, sizeof(*counts), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	at = read_file(argv[1], &size);
	for (i = 0; i < SLOTS; i++)
		shm_fds[i] = shm_ids[i] = -1;
	if (argc > 3)
		open_bystander();
	end = at + size;
	for (number = 0; at < end; number++) {
		memcpy(&program, at, sizeof(program));
		killed += run((const struct program *)at, uid, number);
		at += sizeof(program) + program.bytes;
		if (bystander >= 0 && (number % 16 == 0 || at >= end))
			check_bystander(number);
	}
	printf("{\"played\": %d, \"killed\": %d, \"calls\": {", number, killed);
	for (i = 0; i < 16; i++) {
		printf("%s\"%d\": {", i ? ", " : "", i);
		for (k = 0, size = 0; k < ERRNOS; k++)
			if (counts->errnos[i][k])
				printf("%s\"%d\": %u", size++ ? ", " : "", k, counts->errnos[i][k]);
		printf("}");
	}
	printf("}}\n");
	return 0;
}
