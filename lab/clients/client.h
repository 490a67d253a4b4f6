/* SPDX-License-Identifier: BSD-2-Clause */
/* What the client applications of the lab share. */
#ifndef LAB_CLIENT_H
#define LAB_CLIENT_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <tee_client_api.h>

#define PARAMS(a, b, c, d) TEEC_PARAM_TYPES(TEEC_##a, TEEC_##b, TEEC_##c, TEEC_##d)

struct client {
	TEEC_Context context;
	TEEC_Session session;
};

/* Ends the program with a line that says what came of which step: code, origin. */
static inline void check(const char *step, TEEC_Result result, uint32_t origin)
{
	if (result == TEEC_SUCCESS)
		return;
	printf("%s %#x %u\n", step, result, origin);
	exit(1);
}

static inline void connect_to(struct client *client, const TEEC_UUID *uuid)
{
	uint32_t origin = 0;

	check("initialize", TEEC_InitializeContext(NULL, &client->context), TEEC_ORIGIN_API);
	check("open", TEEC_OpenSession(&client->context, &client->session, uuid, TEEC_LOGIN_PUBLIC,
				       NULL, NULL, &origin), origin);
}

static inline void disconnect(struct client *client)
{
	TEEC_CloseSession(&client->session);
	TEEC_FinalizeContext(&client->context);
}

static inline void call(struct client *client, uint32_t command, TEEC_Operation *operation)
{
	uint32_t origin = 0;

	check("invoke", TEEC_InvokeCommand(&client->session, command, operation, &origin), origin);
}

#endif
