// SPDX-License-Identifier: GPL-2.0-only
/* What a client does: contexts, sessions, calls, cancelling. */
#include <linux/slab.h>
#include <linux/uuid.h>

#include "virtio_tee.h"

static struct vtee *vtee_of(struct tee_context *tctx)
{
	return tee_get_drvdata(tctx->teedev);
}

static void vtee_get_version(struct tee_device *teedev, struct tee_ioctl_version_data *version)
{
	struct vtee *vt = tee_get_drvdata(teedev);

	*version = vt->version;
}

/* -- contexts */

static void vtee_ctx_free(struct kref *ref)
{
	kfree(container_of(ref, struct vtee_ctx, ref));
}

void vtee_ctx_put(struct vtee_ctx *ctx)
{
	kref_put(&ctx->ref, vtee_ctx_free);
}

static void vtee_ctx_closed(struct vtee_req *req)
{
	struct vtee_answer answer;

	if (!vtee_req_answer(req, &answer) &&
	    (answer.status == VTEE_STATUS_OK || answer.status == VTEE_STATUS_NO_CONTEXT)) {
		spin_lock(&req->vt->parked_lock);
		req->ctx->closed = true;
		spin_unlock(&req->vt->parked_lock);
	}
	vtee_parked_look(req->vt);
}

/*
 * The device ends everything under the context; it is waited for only where nothing can hold it up.
 */
static void vtee_ctx_close(struct vtee_ctx *ctx)
{
	struct vtee *vt = ctx->vt;
	bool quiet = !atomic_read(&ctx->requests);
	struct vtee_answer answer;
	struct vtee_req *req;

	spin_lock(&vt->parked_lock);
	ctx->closing = true;
	spin_unlock(&vt->parked_lock);
	if (!ctx->id)
		return;
	req = vtee_req_alloc(vt, ctx, VTEE_REQUEST_CLOSE_CONTEXT, 0, 0, 0);
	if (!req)
		return;
	if (!quiet) {
		vtee_req_post(req, vtee_ctx_closed);
		return;
	}
	req->finish = vtee_ctx_closed;
	if (!vtee_req_call_bounded(req, &answer, VTEE_CLOSE_TIMEOUT))
		vtee_ctx_closed(req);
	vtee_req_put(req);
}

/* Nobody is there any more for whom it was opened. */
static void vtee_ctx_orphaned(struct vtee_req *req)
{
	const struct vtee_open_context_response *body;
	struct vtee_request_header *header;
	struct vtee_answer answer;
	struct vtee_req *close;

	if (vtee_req_answer(req, &answer) || answer.status != VTEE_STATUS_OK)
		return;
	close = vtee_req_alloc(req->vt, NULL, VTEE_REQUEST_CLOSE_CONTEXT, 0, 0, 0);
	if (!close)
		return;
	body = answer.body;
	header = close->out;
	header->context = body->context;
	close->epoch = req->epoch;
	vtee_req_post(close, NULL);
}

/*
 * Open the device's context. Returns 0 or -ENODEV, -ESTALE, -EBUSY, -EINTR, -ENOMEM, -EPROTO, -EIO.
 */
static int vtee_ctx_open_once(struct vtee_ctx *ctx)
{
	const struct vtee_open_context_response *body;
	struct vtee *vt = ctx->vt;
	struct vtee_answer answer;
	struct vtee_req *req;
	int rc;

	req = vtee_req_alloc(vt, NULL, VTEE_REQUEST_OPEN_CONTEXT, sizeof(struct vtee_open_context),
			     0, sizeof(struct vtee_open_context_response));
	if (!req)
		return -ENOMEM;
	req->finish = vtee_ctx_orphaned;
	rc = vtee_req_call(req, &answer);
	if (rc)
		goto out;
	if (answer.status == VTEE_STATUS_STALE_EPOCH) {
		flush_work(&vt->epoch_work);
		rc = -ESTALE;
	} else if (answer.status == VTEE_STATUS_LIMIT) {
		rc = -EBUSY;
	} else if (answer.status != VTEE_STATUS_OK || answer.ret != TEEC_SUCCESS) {
		rc = answer.ret == TEEC_ERROR_OUT_OF_MEMORY ? -ENOMEM : -EIO;
	} else {
		body = answer.body;
		if (!body->context) {
			vtee_break(vt, "it gave no id to a context");
			rc = -EPROTO;
			goto out;
		}
		WRITE_ONCE(ctx->id, le32_to_cpu(body->context));
		/* Whoever reads this epoch must not read the last one's id. */
		smp_store_release(&ctx->epoch, req->epoch);
	}
out:
	vtee_req_put(req);
	return rc;
}

static int vtee_ctx_open(struct vtee_ctx *ctx)
{
	int tries = 3;
	int rc;

	do {
		rc = vtee_ctx_open_once(ctx);
	} while (rc == -ESTALE && --tries);
	return rc;
}

/*
 * A context of a lost epoch is gone for its client, who has to open another one. A supplicant has
 * nothing to lose and serves whoever comes: its context is opened again.
 */
int vtee_ctx_revive(struct vtee_ctx *ctx)
{
	int rc = 0;

	if (likely(ctx->epoch == READ_ONCE(ctx->vt->epoch)))
		return 0;
	if (!ctx->privileged)
		return -ESTALE;
	mutex_lock(&ctx->open_lock);
	if (ctx->epoch != READ_ONCE(ctx->vt->epoch))
		rc = vtee_ctx_open(ctx);
	mutex_unlock(&ctx->open_lock);
	return rc;
}

static int vtee_open_any(struct tee_context *tctx, bool privileged)
{
	struct vtee *vt = vtee_of(tctx);
	struct vtee_ctx *ctx;
	int rc;

	ctx = kzalloc(sizeof(*ctx), GFP_KERNEL);
	if (!ctx)
		return -ENOMEM;
	kref_init(&ctx->ref);
	mutex_init(&ctx->open_lock);
	ctx->vt = vt;
	ctx->privileged = privileged;
	rc = vtee_ctx_open(ctx);
	if (rc) {
		vtee_ctx_put(ctx);
		return rc;
	}
	tctx->data = ctx;
	tctx->cap_memref_null = vt->version.gen_caps & TEE_GEN_CAP_MEMREF_NULL;
	return 0;
}

static void vtee_release(struct tee_context *tctx)
{
	struct vtee_ctx *ctx = tctx->data;

	vtee_ctx_close(ctx);
	vtee_ctx_put(ctx);
	tctx->data = NULL;
}

static int vtee_open(struct tee_context *tctx)
{
	return vtee_open_any(tctx, false);
}

static int vtee_open_supp(struct tee_context *tctx)
{
	struct vtee *vt = vtee_of(tctx);
	int rc;

	rc = vtee_open_any(tctx, true);
	if (rc)
		return rc;
	rc = vtee_supp_open(vt, tctx);
	if (rc)
		vtee_release(tctx);
	return rc;
}

static void vtee_release_supp(struct tee_context *tctx)
{
	vtee_supp_release(vtee_of(tctx));
	vtee_release(tctx);
}

/* -- sessions and calls */

static void vtee_call_end(struct vtee_req *req)
{
	struct vtee *vt = req->vt;

	if (!list_empty_careful(&vt->lent)) {
		mutex_lock(&vt->rpc_lock);
		vtee_lent_back(vt, req->tag);
		mutex_unlock(&vt->rpc_lock);
	}
	vtee_params_done(req);
}

/* What a client gets for a call that has no answer; other errors are the system call's. */
static int vtee_call_failed(int rc, u32 *ret, u32 *origin)
{
	switch (rc) {
	case -ENODEV:
	case -ESTALE:
	case -EPROTO:
		*ret = TEEC_ERROR_TARGET_DEAD;
		*origin = TEEC_ORIGIN_COMMS;
		return 0;
	case -ECANCELED:
		*ret = TEEC_ERROR_CANCEL;
		*origin = TEEC_ORIGIN_API;
		return 0;
	default:
		return rc;
	}
}

/*
 * Make a call. Afterwards the request is the caller's, with vtee_call_end() done or left to
 * finish(): it is to be put and nothing else.
 */
static int vtee_call(struct vtee_req *req, struct vtee_answer *answer)
{
	int rc;

	rc = vtee_req_call(req, answer);
	if (READ_ONCE(req->orphan)) {
		if (rc == -EINTR)
			vtee_cancel_tag(req->vt, req->ctx, req->tag);
	} else {
		vtee_params_sync_cpu(req);
		vtee_call_end(req);
	}
	return rc;
}

static void vtee_post_close_session(struct vtee *vt, struct vtee_ctx *ctx, u64 epoch, u32 session)
{
	struct vtee_close_session *body;
	struct vtee_req *req;

	req = vtee_req_alloc(vt, ctx, VTEE_REQUEST_CLOSE_SESSION, sizeof(*body), 0, 0);
	if (!req)
		return;
	req->epoch = epoch;
	body = vtee_req_body(req);
	body->session = cpu_to_le32(session);
	vtee_req_post(req, NULL);
}

static void vtee_session_orphaned(struct vtee_req *req)
{
	const struct vtee_open_session_response *body;
	struct vtee_answer answer;

	vtee_call_end(req);
	if (vtee_req_answer(req, &answer) || answer.status != VTEE_STATUS_OK)
		return;
	body = answer.body;
	if (body->session)
		vtee_post_close_session(req->vt, req->ctx, req->epoch, le32_to_cpu(body->session));
}

static int vtee_session_opened(struct vtee_req *req, const struct vtee_answer *answer,
			       struct tee_ioctl_open_session_arg *arg, struct tee_param *params)
{
	const struct vtee_open_session_response *body = answer->body;
	int rc;

	if (!body->session != !!answer->ret ||
	    le32_to_cpu(body->num_params) != arg->num_params) {
		vtee_break(req->vt, "it opened a session with a wrong answer");
		return -EPROTO;
	}
	rc = vtee_params_in(req, (const struct vtee_param *)(body + 1), params, arg->num_params,
			    answer->ret);
	if (!rc)
		arg->session = le32_to_cpu(body->session);
	return rc;
}

static int vtee_open_session(struct tee_context *tctx, struct tee_ioctl_open_session_arg *arg,
			     struct tee_param *params)
{
	struct vtee *vt = vtee_of(tctx);
	size_t tail = array_size(arg->num_params, sizeof(struct vtee_param));
	struct vtee_open_session *body;
	struct vtee_answer answer;
	struct vtee_req *req;
	uuid_t client;
	int rc;

	arg->session = 0;
	if (arg->num_params > vt->max_params)
		return -EINVAL;
	rc = tee_session_calc_client_uuid(&client, arg->clnt_login, arg->clnt_uuid);
	if (rc)
		return rc;
	req = vtee_req_alloc(vt, tctx->data, VTEE_REQUEST_OPEN_SESSION, sizeof(*body) + tail,
			     arg->num_params, sizeof(struct vtee_open_session_response) + tail);
	if (!req)
		return -ENOMEM;
	body = vtee_req_body(req);
	memcpy(body->uuid, arg->uuid, sizeof(body->uuid));
	export_uuid(body->client_uuid, &client);
	body->client_login = cpu_to_le32(arg->clnt_login);
	body->num_params = cpu_to_le32(arg->num_params);
	req->cancel_id = arg->cancel_id;
	req->finish = vtee_session_orphaned;
	rc = vtee_params_out(req, (struct vtee_param *)(body + 1), params, arg->num_params);
	if (rc) {
		vtee_params_done(req);
	} else {
		rc = vtee_call(req, &answer);
		if (!rc) {
			arg->ret = answer.ret;
			arg->ret_origin = answer.origin;
			if (answer.status == VTEE_STATUS_OK)
				rc = vtee_session_opened(req, &answer, arg, params);
		}
	}
	vtee_req_put(req);
	return vtee_call_failed(rc, &arg->ret, &arg->ret_origin);
}

static int vtee_close_session(struct tee_context *tctx, u32 session)
{
	struct vtee *vt = vtee_of(tctx);
	struct vtee_close_session *body;
	struct vtee_answer answer;
	struct vtee_req *req;
	int rc;

	if (!session)
		return -EINVAL;
	req = vtee_req_alloc(vt, tctx->data, VTEE_REQUEST_CLOSE_SESSION, sizeof(*body), 0, 0);
	if (!req)
		return -ENOMEM;
	body = vtee_req_body(req);
	body->session = cpu_to_le32(session);
	rc = vtee_req_call(req, &answer);
	vtee_req_put(req);
	if (rc == -ENODEV || rc == -ESTALE)
		return 0; /* it has ended with all others */
	if (rc)
		return rc;
	return answer.status == VTEE_STATUS_OK || answer.status == VTEE_STATUS_STALE_EPOCH ?
		       0 :
		       -EINVAL;
}

static void vtee_invoke_orphaned(struct vtee_req *req)
{
	vtee_call_end(req);
}

static int vtee_invoked(struct vtee_req *req, const struct vtee_answer *answer,
			struct tee_ioctl_invoke_arg *arg, struct tee_param *params)
{
	const struct vtee_invoke_response *body = answer->body;

	if (le32_to_cpu(body->num_params) != arg->num_params) {
		vtee_break(req->vt, "it answered a call with another number of parameters");
		return -EPROTO;
	}
	return vtee_params_in(req, (const struct vtee_param *)(body + 1), params, arg->num_params,
			      answer->ret);
}

static int vtee_invoke(struct tee_context *tctx, struct tee_ioctl_invoke_arg *arg,
		       struct tee_param *params)
{
	struct vtee *vt = vtee_of(tctx);
	size_t tail = array_size(arg->num_params, sizeof(struct vtee_param));
	struct vtee_answer answer;
	struct vtee_invoke *body;
	struct vtee_req *req;
	int rc;

	if (arg->num_params > vt->max_params)
		return -EINVAL;
	req = vtee_req_alloc(vt, tctx->data, VTEE_REQUEST_INVOKE, sizeof(*body) + tail,
			     arg->num_params, sizeof(struct vtee_invoke_response) + tail);
	if (!req)
		return -ENOMEM;
	body = vtee_req_body(req);
	body->session = cpu_to_le32(arg->session);
	body->func = cpu_to_le32(arg->func);
	body->num_params = cpu_to_le32(arg->num_params);
	req->session = arg->session;
	req->cancel_id = arg->cancel_id;
	req->finish = vtee_invoke_orphaned;
	rc = vtee_params_out(req, (struct vtee_param *)(body + 1), params, arg->num_params);
	if (rc) {
		vtee_params_done(req);
	} else {
		rc = vtee_call(req, &answer);
		if (!rc) {
			arg->ret = answer.ret;
			arg->ret_origin = answer.origin;
			if (answer.status == VTEE_STATUS_OK)
				rc = vtee_invoked(req, &answer, arg, params);
		}
	}
	vtee_req_put(req);
	return vtee_call_failed(rc, &arg->ret, &arg->ret_origin);
}

static int vtee_cancel_req(struct tee_context *tctx, u32 cancel_id, u32 session)
{
	return vtee_req_cancel(vtee_of(tctx), tctx->data, session, cancel_id) ? 0 : -ENOENT;
}

const struct tee_driver_ops vtee_ops = {
	.get_version = vtee_get_version,
	.open = vtee_open,
	.release = vtee_release,
	.open_session = vtee_open_session,
	.close_session = vtee_close_session,
	.invoke_func = vtee_invoke,
	.cancel_req = vtee_cancel_req,
	.shm_register = vtee_shm_register,
	.shm_unregister = vtee_shm_unregister,
};

const struct tee_driver_ops vtee_supp_ops = {
	.get_version = vtee_get_version,
	.open = vtee_open_supp,
	.release = vtee_release_supp,
	.supp_recv = vtee_supp_recv,
	.supp_send = vtee_supp_send,
	.shm_register = vtee_shm_register,
	.shm_unregister = vtee_shm_unregister,
};
