// SPDX-License-Identifier: BSD-2-Clause
/*
 * Each function and each kind of parameter of the TEE Client API, with the TA for tests. Prints one line per thing that
 * it did: a name, then what came of it (codes as code/origin).
 */
#include <pthread.h>
#include <unistd.h>

#include "client.h"

enum { NOTHING, ADD, XOR, TOUCH, WAIT, SHORT, PANIC, ECHO, FAIL = 9 };

#define MANY 8
#define ROUNDS 25
#define LARGE ((4 << 20) + 123)

static const TEEC_UUID probe = { 0x3f0c8d2e, 0x6a51, 0x4b7c, { 0x9d, 0x14, 0x8e, 0x2b, 0x7a, 0x90, 0xc5, 0xf6 } };
static const TEEC_UUID nobody = { 1, 2, 3, { 4 } };

static struct client client;

static uint32_t invoke(uint32_t command, TEEC_Operation *operation, uint32_t *origin)
{
	*origin = 0;
	return TEEC_InvokeCommand(&client.session, command, operation, origin);
}

static void report(const char *name, uint32_t command, TEEC_Operation *operation)
{
	uint32_t origin, result = invoke(command, operation, &origin);

	printf("%s %#x/%u\n", name, result, origin);
}

static void open_as(const char *name, const TEEC_UUID *uuid, uint32_t login, const void *data, TEEC_Operation *operation)
{
	TEEC_Session session;
	uint32_t origin = 0;
	TEEC_Result result = TEEC_OpenSession(&client.context, &session, uuid, login, data, operation, &origin);

	printf("%s %#x/%u\n", name, result, origin);
	if (result == TEEC_SUCCESS)
		TEEC_CloseSession(&session);
}

static void sessions(void)
{
	TEEC_Context context;
	gid_t group = getgid();
	TEEC_Operation refuse = { .paramTypes = PARAMS(VALUE_INPUT, NONE, NONE, NONE),
				  .params = { { .value = { 0x10000002, 0 } } } };

	printf("no_device %#x\n", TEEC_InitializeContext("no such TEE", &context));
	printf("by_name %#x\n", TEEC_InitializeContext("optee-tz", &context));
	TEEC_FinalizeContext(&context);
	open_as("nobody", &nobody, TEEC_LOGIN_PUBLIC, NULL, NULL);
	open_as("refused", &probe, TEEC_LOGIN_PUBLIC, NULL, &refuse);
	open_as("user", &probe, TEEC_LOGIN_USER, NULL, NULL);
	open_as("group", &probe, TEEC_LOGIN_GROUP, &group, NULL);
}

static void parameters(void)
{
	char text[] = "Tee", room[11] = "";
	TEEC_Operation echo = { .paramTypes = PARAMS(VALUE_OUTPUT, VALUE_INOUT, MEMREF_TEMP_INPUT, VALUE_INPUT),
				.params[2].tmpref = { text, 3 } };
	TEEC_Operation null = { .paramTypes = PARAMS(VALUE_OUTPUT, MEMREF_TEMP_OUTPUT, MEMREF_TEMP_INOUT, NONE) };
	TEEC_Operation xor = { .paramTypes = PARAMS(MEMREF_TEMP_INOUT, VALUE_INPUT, NONE, NONE),
			       .params = { { .tmpref = { text, 3 } }, { .value = { 0x20, 0 } } } };
	TEEC_Operation small = { .paramTypes = PARAMS(MEMREF_TEMP_OUTPUT, VALUE_INPUT, NONE, NONE),
				 .params = { { .tmpref = { room, 10 } }, { .value = { 11, 0 } } } };
	TEEC_Operation fail = { .paramTypes = PARAMS(VALUE_INPUT, NONE, NONE, NONE),
				.params = { { .value = { 0x10000001, 0 } } } };

	report("echo", ECHO, &echo);
	printf("echoed %u %u\n", echo.params[0].value.a, echo.params[0].value.b);
	report("null", ECHO, &null);
	printf("nulls %u %u\n", null.params[0].value.a, null.params[0].value.b);
	report("xor", XOR, &xor);
	printf("xored %s\n", text);
	report("short", SHORT, &small);
	printf("needs %zu, has %d\n", small.params[0].tmpref.size, room[0]);
	small.params[1].value.a = 7;
	report("fits", SHORT, &small);
	printf("has %zu %s\n", small.params[0].tmpref.size, room);
	report("fail", FAIL, &fail);
	report("no_command", 99, NULL);
}

static void fill(uint8_t *data, size_t size)
{
	for (size_t i = 0; i < size; i++)
		data[i] = i;
}

/* Is what is in [from, to) changed by the mask, and nothing else? */
static int masked(const uint8_t *data, size_t size, size_t from, size_t to, uint8_t mask)
{
	for (size_t i = 0; i < size; i++)
		if (data[i] != (uint8_t)(i ^ (i >= from && i < to ? mask : 0)))
			return 0;
	return 1;
}

/* Whole, then a part that starts and ends in the middle of a page. */
static void shared(const char *name, TEEC_SharedMemory *memory)
{
	const size_t from = 5000, size = memory->size - 6000;
	TEEC_Operation whole = { .paramTypes = PARAMS(MEMREF_WHOLE, VALUE_INPUT, NONE, NONE),
				 .params = { { .memref = { memory, 0, 0 } }, { .value = { 0x5a, 0 } } } };
	TEEC_Operation part = { .paramTypes = PARAMS(MEMREF_PARTIAL_INOUT, VALUE_INPUT, NONE, NONE),
				.params = { { .memref = { memory, size, from } }, { .value = { 0xa5, 0 } } } };
	TEEC_Operation outside = { .paramTypes = PARAMS(VALUE_OUTPUT, MEMREF_PARTIAL_INPUT, NONE, NONE),
				   .params = { { .value = { 0, 0 } }, { .memref = { memory, memory->size, 1 } } } };

	fill(memory->buffer, memory->size);
	report(name, XOR, &whole);
	printf("%s_whole %d\n", name, masked(memory->buffer, memory->size, 0, memory->size, 0x5a));
	fill(memory->buffer, memory->size);
	report(name, XOR, &part);
	printf("%s_part %d\n", name, masked(memory->buffer, memory->size, from, from + size, 0xa5));
	report("outside", ECHO, &outside);
	TEEC_ReleaseSharedMemory(memory);
}

static void memories(void)
{
	TEEC_SharedMemory allocated = { .size = 100000, .flags = TEEC_MEM_INPUT | TEEC_MEM_OUTPUT };
	TEEC_SharedMemory registered = { .size = LARGE, .flags = TEEC_MEM_INPUT | TEEC_MEM_OUTPUT };
	TEEC_SharedMemory none = { .size = 10, .flags = 0x80 };
	uint8_t *room = malloc(LARGE + 1);
	TEEC_Operation large = { .paramTypes = PARAMS(MEMREF_TEMP_INOUT, VALUE_INPUT, NONE, NONE),
				 .params = { { .tmpref = { room, LARGE } }, { .value = { 0x77, 0 } } } };

	fill(room, LARGE);
	report("large", XOR, &large);
	printf("large_whole %d\n", masked(room, LARGE, 0, LARGE, 0x77));
	check("allocate", TEEC_AllocateSharedMemory(&client.context, &allocated), 0);
	shared("allocated", &allocated);
	registered.buffer = room + 1;
	check("register", TEEC_RegisterSharedMemory(&client.context, &registered), 0);
	shared("registered", &registered);
	printf("bad_flags %#x\n", TEEC_AllocateSharedMemory(&client.context, &none));
	free(room);
}

static void *cancel_soon(void *operation)
{
	usleep(300000);
	TEEC_RequestCancellation(operation);
	return NULL;
}

static void cancel(void)
{
	TEEC_Operation wait = { .paramTypes = PARAMS(VALUE_INPUT, NONE, NONE, NONE) };
	pthread_t thread;

	pthread_create(&thread, NULL, cancel_soon, &wait);
	report("cancelled", WAIT, &wait);
	pthread_join(thread, NULL);
}

/* One session's calls; NULL if all is right. */
static void *work(void *number)
{
	const uint32_t mask = 1 + (uintptr_t)number;
	struct client mine;
	uint8_t data[5001];
	uint32_t origin;

	connect_to(&mine, &probe);
	for (int i = 0; i < ROUNDS; i++) {
		TEEC_Operation xor = { .paramTypes = PARAMS(MEMREF_TEMP_INOUT, VALUE_INPUT, NONE, NONE),
				       .params = { { .tmpref = { data, sizeof(data) } }, { .value = { mask, 0 } } } };

		fill(data, sizeof(data));
		if (TEEC_InvokeCommand(&mine.session, XOR, &xor, &origin) != TEEC_SUCCESS ||
		    !masked(data, sizeof(data), 0, sizeof(data), mask))
			return number;
	}
	disconnect(&mine);
	return NULL;
}

static void many(void)
{
	pthread_t threads[MANY];
	void *wrong;
	int right = 0;

	for (uintptr_t i = 0; i < MANY; i++)
		pthread_create(&threads[i], NULL, work, (void *)(i + 1));
	for (int i = 0; i < MANY; i++) {
		pthread_join(threads[i], &wrong);
		right += !wrong;
	}
	printf("many %d of %d\n", right, MANY);
}

int main(void)
{
	setvbuf(stdout, NULL, _IOLBF, 0);
	connect_to(&client, &probe);
	sessions();
	parameters();
	memories();
	cancel();
	many();
	report("panic", PANIC, NULL);
	report("after_panic", NOTHING, NULL);
	disconnect(&client);
	return 0;
}
