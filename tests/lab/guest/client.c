// SPDX-License-Identifier: GPL-2.0-only
/*
 * A client on the bare ioctls of /dev/tee0. Prints one line for each thing it did: a name, then
 * what came of it.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/tee.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#define MAX_PARAMS 8

static const uint8_t hello[16] = { 0x8a, 0xaa, 0xf2, 0x00, 0x24, 0x50, 0x11, 0xe4,
				   0xab, 0xe2, 0x00, 0x02, 0xa5, 0xd5, 0xc5, 0x1b };
static const uint8_t probe[16] = { 0x3f, 0x0c, 0x8d, 0x2e, 0x6a, 0x51, 0x4b, 0x7c,
				   0x9d, 0x14, 0x8e, 0x2b, 0x7a, 0x90, 0xc5, 0xf6 };

enum { ADD = 1, XOR = 2, WAIT = 4, SHORT = 5, PANIC = 6, ECHO = 7, FAIL = 9 };

union open_arg {
	struct tee_ioctl_open_session_arg arg;
	uint8_t room[sizeof(struct tee_ioctl_open_session_arg) +
		     MAX_PARAMS * sizeof(struct tee_ioctl_param)];
};

union invoke_arg {
	struct tee_ioctl_invoke_arg arg;
	uint8_t room[sizeof(struct tee_ioctl_invoke_arg) +
		     MAX_PARAMS * sizeof(struct tee_ioctl_param)];
};

static int fd;

static void fail(const char *what)
{
	printf("%s errno %d\n", what, errno);
	exit(1);
}

static uint32_t open_session(const uint8_t *uuid, uint32_t login, uint32_t *ret)
{
	union open_arg room = { 0 };
	struct tee_ioctl_buf_data data = { (uintptr_t)&room, sizeof(room.arg) };

	memcpy(room.arg.uuid, uuid, 16);
	room.arg.clnt_login = login;
	if (ioctl(fd, TEE_IOC_OPEN_SESSION, &data))
		fail("open_session");
	*ret = room.arg.ret;
	return room.arg.session;
}

static uint32_t invoke(uint32_t session, uint32_t func, struct tee_ioctl_param *params,
		       uint32_t count, uint32_t *origin)
{
	union invoke_arg room = { 0 };
	struct tee_ioctl_buf_data data = { (uintptr_t)&room,
					   sizeof(room.arg) + count * sizeof(*params) };

	room.arg.session = session;
	room.arg.func = func;
	room.arg.cancel_id = func;
	room.arg.num_params = count;
	memcpy(room.arg.params, params, count * sizeof(*params));
	if (ioctl(fd, TEE_IOC_INVOKE, &data)) {
		*origin = 0;
		return -errno;
	}
	memcpy(params, room.arg.params, count * sizeof(*params));
	*origin = room.arg.ret_origin;
	return room.arg.ret;
}

static void close_session(uint32_t session)
{
	struct tee_ioctl_close_session_arg arg = { session };

	printf("close_session %d\n", ioctl(fd, TEE_IOC_CLOSE_SESSION, &arg) ? errno : 0);
}

static struct tee_ioctl_param memref(uint64_t attr, uint64_t id, uint64_t offset, uint64_t size)
{
	return (struct tee_ioctl_param){ attr, offset, size, id };
}

static void values(void)
{
	struct tee_ioctl_param params[] = {
		{ TEE_IOCTL_PARAM_ATTR_TYPE_VALUE_INPUT, 1ULL << 40, 1, 0 },
		{ TEE_IOCTL_PARAM_ATTR_TYPE_VALUE_OUTPUT, 9, 9, 9 },
		{ TEE_IOCTL_PARAM_ATTR_TYPE_VALUE_INOUT, 1ULL << 50, 2, 0 },
	};
	uint32_t ret, origin, session = open_session(probe, 0, &ret);

	printf("open_probe %#x\n", ret);
	ret = invoke(session, ADD, params, 3, &origin);
	printf("add %#x %u %llu %llu\n", ret, origin, (unsigned long long)params[1].c,
	       (unsigned long long)params[2].c);
	params[0].a = 0x10000001;
	ret = invoke(session, FAIL, params, 1, &origin);
	printf("fail %#x %u\n", ret, origin);
	close_session(session);
	close_session(session);
}

/* XOR of a part: the bytes around it stay. */
static int xored(const uint8_t *data, size_t size, size_t offset, size_t part, uint8_t mask)
{
	for (size_t i = 0; i < size; i++)
		if (data[i] != (uint8_t)(i ^ (i >= offset && i < offset + part ? mask : 0)))
			return 0;
	return 1;
}

static void try_xor(const char *name, uint32_t session, int id, uint8_t *data, size_t size,
		    size_t offset, size_t part)
{
	struct tee_ioctl_param params[] = {
		memref(TEE_IOCTL_PARAM_ATTR_TYPE_MEMREF_INOUT, id, offset, part),
		{ TEE_IOCTL_PARAM_ATTR_TYPE_VALUE_INPUT, 0x55, 0, 0 },
	};
	uint32_t ret, origin;

	for (size_t i = 0; i < size; i++)
		data[i] = i;
	ret = invoke(session, XOR, params, 2, &origin);
	printf("%s %#x %d %llu\n", name, ret, xored(data, size, offset, part, 0x55),
	       (unsigned long long)params[0].b);
}

static void memory(void)
{
	struct tee_ioctl_shm_alloc_data alloc = { .size = 10000 };
	struct tee_ioctl_shm_register_data reg;
	struct tee_ioctl_param params[4] = { 0 };
	uint32_t ret, origin, session = open_session(probe, 0, &ret);
	size_t size = 8 << 20;
	uint8_t *mine, *theirs;
	int shm;

	shm = ioctl(fd, TEE_IOC_SHM_ALLOC, &alloc);
	if (shm < 0)
		fail("shm_alloc");
	theirs = mmap(NULL, alloc.size, PROT_READ | PROT_WRITE, MAP_SHARED, shm, 0);
	printf("shm_alloc %llu %d\n", (unsigned long long)alloc.size,
	       theirs[0] == 0 && theirs[alloc.size - 1] == 0);
	try_xor("xor_allocated", session, alloc.id, theirs, alloc.size, 100, 5000);

	params[0] = memref(TEE_IOCTL_PARAM_ATTR_TYPE_MEMREF_OUTPUT, alloc.id, 0, 10);
	params[1] = (struct tee_ioctl_param){ TEE_IOCTL_PARAM_ATTR_TYPE_VALUE_INPUT, 11, 0, 0 };
	ret = invoke(session, SHORT, params, 2, &origin);
	printf("short_buffer %#x %llu\n", ret, (unsigned long long)params[0].b);

	params[0] = memref(TEE_IOCTL_PARAM_ATTR_TYPE_MEMREF_INOUT, alloc.id, alloc.size, 1);
	ret = invoke(session, XOR, params, 2, &origin);
	printf("outside %d\n", (int)ret);

	params[0] = (struct tee_ioctl_param){ TEE_IOCTL_PARAM_ATTR_TYPE_VALUE_OUTPUT, 0, 0, 0 };
	params[1] = (struct tee_ioctl_param){ TEE_IOCTL_PARAM_ATTR_TYPE_NONE, 0, 0, 0 };
	params[2] = memref(TEE_IOCTL_PARAM_ATTR_TYPE_MEMREF_INPUT, TEE_MEMREF_NULL, 0, 33);
	params[3] = memref(TEE_IOCTL_PARAM_ATTR_TYPE_MEMREF_INPUT, alloc.id, 8, 0);
	ret = invoke(session, ECHO, params, 4, &origin);
	printf("echo %#x %llu %llu %llu\n", ret, (unsigned long long)params[0].a,
	       (unsigned long long)params[0].b, (unsigned long long)params[0].c);

	/*
	 * Our own, not aligned at either end; freed at once, it lives on in the device until the
	 * last use has ended.
	 */
	mine = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	reg = (struct tee_ioctl_shm_register_data){ (uintptr_t)mine + 123, size - 456, 0, 0 };
	int own = ioctl(fd, TEE_IOC_SHM_REGISTER, &reg);
	if (own < 0)
		fail("shm_register");
	printf("shm_register %llu\n", (unsigned long long)reg.length);
	try_xor("xor_registered", session, reg.id, mine + 123, reg.length, 1000, 5 << 20);
	printf("beside %d\n", mine[122] == 0 && mine[123 + reg.length] == 0);
	close(own);
	params[0] = memref(TEE_IOCTL_PARAM_ATTR_TYPE_MEMREF_INOUT, reg.id, 0, 1);
	printf("closed %d\n", (int)invoke(session, XOR, params, 2, &origin));
	reg = (struct tee_ioctl_shm_register_data){ 4096, 4096, 0, 0 };
	printf("bad_address %d\n", ioctl(fd, TEE_IOC_SHM_REGISTER, &reg) < 0 ? errno : 0);
	reg = (struct tee_ioctl_shm_register_data){ (uintptr_t)mine, 0, 0, 0 };
	printf("empty %d\n", ioctl(fd, TEE_IOC_SHM_REGISTER, &reg) < 0);
	close(shm);
	close_session(session);
}

static uint32_t waiting;

static void *wait_call(void *result)
{
	struct tee_ioctl_param param = { TEE_IOCTL_PARAM_ATTR_TYPE_VALUE_INPUT, 0, 0, 0 };
	uint32_t origin;

	*(uint32_t *)result = invoke(waiting, WAIT, &param, 1, &origin);
	return NULL;
}

static void cancel(void)
{
	struct tee_ioctl_cancel_arg arg = { WAIT, 0 };
	uint32_t ret, result;
	pthread_t thread;
	int tries = 0;

	waiting = open_session(probe, 0, &ret);
	arg.session = waiting;
	printf("cancel_nothing %d\n", ioctl(fd, TEE_IOC_CANCEL, &arg) ? errno : 0);
	pthread_create(&thread, NULL, wait_call, &result);
	while (ioctl(fd, TEE_IOC_CANCEL, &arg) && tries++ < 500)
		usleep(10000);
	pthread_join(thread, NULL);
	printf("cancel %#x\n", result);
	close_session(waiting);
}

int main(void)
{
	struct tee_ioctl_version_data version;
	struct tee_ioctl_param param = { TEE_IOCTL_PARAM_ATTR_TYPE_VALUE_INOUT, 41, 0, 0 };
	uint32_t ret, origin, session;

	fd = open("/dev/tee0", O_RDWR);
	if (fd < 0)
		fail("open");
	if (ioctl(fd, TEE_IOC_VERSION, &version))
		fail("version");
	printf("version %u %#x\n", version.impl_id, version.gen_caps);
	session = open_session(hello, 0, &ret);
	printf("open %#x\n", ret);
	ret = invoke(session, 0, &param, 1, &origin);
	printf("hello %#x %llu\n", ret, (unsigned long long)param.a);
	close_session(session);
	open_session((const uint8_t *)"no such TA 12345", 0, &ret);
	printf("no_ta %#x\n", ret);
	session = open_session(hello, TEE_IOCTL_LOGIN_USER, &ret);
	printf("login_user %#x\n", ret);
	close_session(session);
	values();
	memory();
	cancel();
	session = open_session(probe, 0, &ret);
	ret = invoke(session, PANIC, &param, 0, &origin);
	printf("panic %#x %u\n", ret, origin);
	ret = invoke(session, 0, &param, 0, &origin);
	printf("after_panic %#x\n", ret);
	return 0;
}
