// SPDX-License-Identifier: BSD-2-Clause
/*
 * A client application of each example TA, on libteec. Bytes are hexadecimal, as arguments and in what is printed; a
 * call that fails ends the program with a line that names it, its code and its origin.
 */
#include "client.h"

#define ROOM 65536
#define AES { 0x5dbac793, 0xf574, 0x4871, { 0x8a, 0xd3, 0x04, 0x33, 0x1e, 0xc1, 0x7f, 0x24 } }

struct bytes {
	uint8_t *data;
	size_t size;
};

static struct bytes from_hex(const char *text)
{
	struct bytes bytes = { malloc(strlen(text) / 2 + 1), strlen(text) / 2 };

	for (size_t i = 0; i < bytes.size; i++)
		sscanf(text + 2 * i, "%2hhx", &bytes.data[i]);
	return bytes;
}

static void print_hex(const void *data, size_t size)
{
	for (size_t i = 0; i < size; i++)
		printf("%02x", ((const uint8_t *)data)[i]);
	putchar('\n');
}

static uint32_t number(const char *text)
{
	return strtoul(text, NULL, 0);
}

static TEEC_Parameter value(uint32_t a)
{
	return (TEEC_Parameter){ .value = { .a = a } };
}

static TEEC_Parameter memory(void *data, size_t size)
{
	return (TEEC_Parameter){ .tmpref = { data, size } };
}

/* COMMAND VALUE: what it becomes */
static void hello_world(struct client *client, char **arguments)
{
	TEEC_Operation operation = { .paramTypes = PARAMS(VALUE_INOUT, NONE, NONE, NONE),
				     .params = { value(number(arguments[1])) } };

	call(client, number(arguments[0]), &operation);
	printf("%u\n", operation.params[0].value.a);
}

/* SIZE: as many random bytes */
static void random_bytes(struct client *client, char **arguments)
{
	const size_t size = number(arguments[0]);
	void *data = calloc(1, size + 1);
	TEEC_Operation operation = { .paramTypes = PARAMS(MEMREF_TEMP_OUTPUT, NONE, NONE, NONE),
				     .params = { memory(data, size) } };

	call(client, 0, &operation);
	print_hex(data, operation.params[0].tmpref.size);
}

/* ALGORITHM KEY IV ENCRYPT TEXT: the text, ciphered */
static void aes(struct client *client, char **arguments)
{
	const struct bytes key = from_hex(arguments[1]), iv = from_hex(arguments[2]);
	const struct bytes text = from_hex(arguments[4]);
	uint8_t out[ROOM];
	TEEC_Operation prepare = { .paramTypes = PARAMS(VALUE_INPUT, VALUE_INPUT, VALUE_INPUT, NONE),
				   .params = { value(number(arguments[0])), value(key.size),
					       value(number(arguments[3])) } };
	TEEC_Operation set_key = { .paramTypes = PARAMS(MEMREF_TEMP_INPUT, NONE, NONE, NONE),
				   .params = { memory(key.data, key.size) } };
	TEEC_Operation set_iv = { .paramTypes = PARAMS(MEMREF_TEMP_INPUT, NONE, NONE, NONE),
				  .params = { memory(iv.data, iv.size) } };
	TEEC_Operation cipher = { .paramTypes = PARAMS(MEMREF_TEMP_INPUT, MEMREF_TEMP_OUTPUT, NONE, NONE),
				  .params = { memory(text.data, text.size), memory(out, text.size) } };

	call(client, 0, &prepare);
	call(client, 1, &set_key);
	call(client, 2, &set_iv);
	call(client, 3, &cipher);
	print_hex(out, cipher.params[1].tmpref.size);
}

/* ALGORITHM KEY TEXT: the text, sealed, with its tag */
static void aes_sealed(struct client *client, char **arguments)
{
	const struct bytes key = from_hex(arguments[1]), text = from_hex(arguments[2]);
	uint8_t out[ROOM], tag[16];
	TEEC_Operation prepare = { .paramTypes = PARAMS(VALUE_INPUT, VALUE_INPUT, VALUE_INPUT, NONE),
				   .params = { value(number(arguments[0])), value(key.size), value(1) } };
	TEEC_Operation set_key = { .paramTypes = PARAMS(MEMREF_TEMP_INPUT, NONE, NONE, NONE),
				   .params = { memory(key.data, key.size) } };
	TEEC_Operation seal = { .paramTypes = PARAMS(MEMREF_TEMP_INPUT, MEMREF_TEMP_OUTPUT, VALUE_INPUT,
						     MEMREF_TEMP_INOUT),
				.params = { memory(text.data, text.size), memory(out, text.size), value(1),
					    memory(tag, sizeof(tag)) } };

	call(client, 0, &prepare);
	call(client, 1, &set_key);
	call(client, 4, &seal);
	print_hex(out, seal.params[1].tmpref.size);
	print_hex(tag, seal.params[3].tmpref.size);
}

/* KEY COUNT: as many passwords */
static void hotp(struct client *client, char **arguments)
{
	const struct bytes key = from_hex(arguments[0]);
	TEEC_Operation set_key = { .paramTypes = PARAMS(MEMREF_TEMP_INPUT, NONE, NONE, NONE),
				   .params = { memory(key.data, key.size) } };
	TEEC_Operation next = { .paramTypes = PARAMS(VALUE_OUTPUT, NONE, NONE, NONE) };

	call(client, 0, &set_key);
	for (uint32_t left = number(arguments[1]); left; left--) {
		call(client, 1, &next);
		printf("%06u\n", next.params[0].value.a);
	}
}

static size_t rsa(struct client *client, uint32_t algorithm, int encrypt, void *from, size_t size, void *to)
{
	TEEC_Operation operation = { .paramTypes = PARAMS(MEMREF_TEMP_INPUT, MEMREF_TEMP_OUTPUT, VALUE_INPUT,
							  VALUE_INPUT),
				     .params = { memory(from, size), memory(to, ROOM), value(encrypt),
						 value(algorithm) } };

	call(client, 1, &operation);
	return operation.params[1].tmpref.size;
}

/* BITS ALGORITHM TEXT: the text, enciphered with a new key; the same once more; deciphered */
static void acipher(struct client *client, char **arguments)
{
	const struct bytes text = from_hex(arguments[2]);
	uint8_t sealed[ROOM], opened[ROOM];
	size_t size = 0;
	TEEC_Operation make_key = { .paramTypes = PARAMS(VALUE_INPUT, NONE, NONE, NONE),
				    .params = { value(number(arguments[0])) } };

	call(client, 0, &make_key);
	for (int i = 0; i < 2; i++) {
		size = rsa(client, number(arguments[1]), 1, text.data, text.size, sealed);
		print_hex(sealed, size);
	}
	print_hex(opened, rsa(client, number(arguments[1]), 0, sealed, size, opened));
}

/* 0 NAME, 1 NAME CONTENT, 2 NAME: the content; writes it; deletes it */
static void secure_storage(struct client *client, char **arguments)
{
	const uint32_t command = number(arguments[0]);
	uint8_t out[ROOM];
	TEEC_Operation operation = { .params = { memory(arguments[1], strlen(arguments[1])), memory(out, ROOM) } };

	if (command == 0) {
		operation.paramTypes = PARAMS(MEMREF_TEMP_INPUT, MEMREF_TEMP_OUTPUT, NONE, NONE);
	} else if (command == 1) {
		const struct bytes content = from_hex(arguments[2]);

		operation.paramTypes = PARAMS(MEMREF_TEMP_INPUT, MEMREF_TEMP_INPUT, NONE, NONE);
		operation.params[1] = memory(content.data, content.size);
	} else {
		operation.paramTypes = PARAMS(MEMREF_TEMP_INPUT, NONE, NONE, NONE);
	}
	call(client, command, &operation);
	if (command == 0)
		print_hex(out, operation.params[1].tmpref.size);
}

static const struct example {
	const char *name;
	int arguments; /* the fewest */
	void (*run)(struct client *client, char **arguments);
	TEEC_UUID uuid;
} examples[] = {
	{ "hello_world", 2, hello_world,
	  { 0x8aaaf200, 0x2450, 0x11e4, { 0xab, 0xe2, 0x00, 0x02, 0xa5, 0xd5, 0xc5, 0x1b } } },
	{ "random", 1, random_bytes,
	  { 0xb6c53aba, 0x9669, 0x4668, { 0xa7, 0xf2, 0x20, 0x56, 0x29, 0xd0, 0x0f, 0x86 } } },
	{ "aes", 5, aes, AES },
	{ "aes_sealed", 3, aes_sealed, AES },
	{ "hotp", 2, hotp,
	  { 0x484d4143, 0x2d53, 0x4841, { 0x31, 0x20, 0x4a, 0x6f, 0x63, 0x6b, 0x65, 0x42 } } },
	{ "acipher", 3, acipher,
	  { 0xa734eed9, 0xd6a1, 0x4244, { 0xaa, 0x50, 0x7c, 0x99, 0x71, 0x9e, 0x7b, 0x7b } } },
	{ "secure_storage", 2, secure_storage,
	  { 0xf4e750bb, 0x1437, 0x4fbf, { 0x87, 0x85, 0x8d, 0x35, 0x80, 0xc3, 0x49, 0x94 } } },
};

int main(int argc, char **argv)
{
	struct client client;

	for (size_t i = 0; i < sizeof(examples) / sizeof(*examples); i++) {
		if (argc < 2 || strcmp(argv[1], examples[i].name) || argc - 2 < examples[i].arguments)
			continue;
		connect_to(&client, &examples[i].uuid);
		examples[i].run(&client, argv + 2);
		disconnect(&client);
		return 0;
	}
	fputs("usage: examples hello_world COMMAND VALUE | random SIZE | aes ALGORITHM KEY IV ENCRYPT TEXT\n"
	      "  | aes_sealed ALGORITHM KEY TEXT\n"
	      "  | hotp KEY COUNT | acipher BITS ALGORITHM TEXT | secure_storage 0|1|2 NAME [CONTENT]\n", stderr);
	return 2;
}
