// SPDX-License-Identifier: GPL-2.0-only
/*
 * Requests: from being built to being returned. A request belongs to the device from the moment it
 * is added to a queue until it is returned or the device was reset, whoever waited for it; all that
 * it names stays until then.
 */
#include <linux/freezer.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>

#include "virtio_tee.h"

static bool vtee_is_control(const struct vtee_req *req)
{
	return req->type >= VTEE_REQUEST_CANCEL;
}

static bool vtee_is_call(const struct vtee_req *req)
{
	return req->type == VTEE_REQUEST_OPEN_SESSION || req->type == VTEE_REQUEST_INVOKE;
}

static bool vtee_is_owed(const struct vtee_req *req)
{
	return req->type == VTEE_REQUEST_RPC_REPLY || req->type == VTEE_REQUEST_RPC_WITHDRAWN_ACK;
}

static void vtee_req_free(struct kref *ref)
{
	struct vtee_req *req = container_of(ref, struct vtee_req, ref);
	unsigned int i;

	for (i = 0; i < req->num_chunks; i++)
		kfree(req->chunk[i]);
	kfree(req->out);
	kfree(req->in);
	kfree(req->answer);
	if (req->ctx) {
		atomic_dec(&req->ctx->requests);
		vtee_ctx_put(req->ctx);
	}
	kfree(req);
}

void vtee_req_put(struct vtee_req *req)
{
	kref_put(&req->ref, vtee_req_free);
}

/**
 * vtee_req_alloc() - a request with its header filled in
 * @vt:		the device
 * @ctx:	the context that it names, or NULL
 * @type:	enum vtee_request
 * @body:	bytes of its body, parameters included
 * @num_params:	places for the memory that it keeps in use
 * @response:	bytes of the response after its header
 *
 * Returns NULL without memory.
 */
struct vtee_req *vtee_req_alloc(struct vtee *vt, struct vtee_ctx *ctx, u32 type, size_t body,
				unsigned int num_params, size_t response)
{
	struct vtee_request_header *header;
	struct vtee_req *req;

	req = kzalloc(struct_size(req, span, num_params), GFP_KERNEL);
	if (!req)
		return NULL;
	kref_init(&req->ref);
	init_completion(&req->done);
	INIT_LIST_HEAD(&req->link);
	INIT_HLIST_NODE(&req->hash);
	req->vt = vt;
	req->type = type;
	req->out_len = sizeof(*header) + body;
	req->in_len = sizeof(struct vtee_response_header) + response;
	req->out = kzalloc(req->out_len, GFP_KERNEL);
	req->in = kzalloc(req->in_len, GFP_KERNEL);
	req->answer = kmalloc(req->in_len, GFP_KERNEL);
	if (!req->out || !req->in || !req->answer) {
		vtee_req_put(req);
		return NULL;
	}
	header = req->out;
	header->type = cpu_to_le32(type);
	if (ctx) {
		kref_get(&ctx->ref);
		atomic_inc(&ctx->requests);
		req->ctx = ctx;
		/* In this order: see vtee_ctx_revive(). */
		req->epoch = smp_load_acquire(&ctx->epoch);
		header->context = cpu_to_le32(READ_ONCE(ctx->id));
	} else {
		req->epoch = READ_ONCE(vt->epoch);
	}
	return req;
}

/* -- giving requests to the device; with the lock held */

static int vtee_add(struct virtqueue *vq, struct vtee_req *req)
{
	struct scatterlist out, in, chunks[VTEE_MAX_CHUNKS], *sgs[3];
	unsigned int i, num_out = 0;
	int rc;

	sg_init_one(&out, req->out, req->out_len);
	sgs[num_out++] = &out;
	if (req->num_chunks) {
		sg_init_table(chunks, req->num_chunks);
		for (i = 0; i < req->num_chunks; i++)
			sg_set_buf(&chunks[i], req->chunk[i], req->chunk_len[i]);
		sgs[num_out++] = chunks;
	}
	sg_init_one(&in, req->in, req->in_len);
	sgs[num_out] = &in;
	rc = virtqueue_add_sgs(vq, sgs, num_out, 1, req, GFP_ATOMIC);
	if (rc)
		return rc;
	req->state = VTEE_SENT;
	if (vtee_is_call(req))
		req->vt->calls++;
	virtqueue_kick(vq);
	return 0;
}

static int vtee_place(struct vtee *vt, struct vtee_req *req)
{
	struct virtqueue *vq;
	unsigned int i, keep;
	int rc = -ENOSPC;

	if (vtee_is_control(req))
		return vtee_add(vt->control, req);
	for (i = 0; i < vt->num_request && rc == -ENOSPC; i++) {
		vq = vt->request[vt->next_queue++ % vt->num_request];
		keep = vtee_is_call(req) ? min(VTEE_RESERVE, virtqueue_get_vring_size(vq) / 2) : 0;
		if (vq->num_free > keep)
			rc = vtee_add(vq, req);
	}
	return rc;
}

/* Nobody but the caller can reach @req any more: wake who waits, or have it finished. */
static void vtee_returned(struct vtee *vt, struct vtee_req *req)
{
	hash_del(&req->hash);
	req->state = VTEE_RETURNED;
	if (req->orphan) {
		list_add_tail(&req->link, &vt->finished);
		queue_work(vt->wq, &vt->finish_work);
	} else {
		complete(&req->done);
		vtee_req_put(req);
	}
}

static void vtee_flush_list(struct vtee *vt, struct list_head *list)
{
	struct vtee_req *req, *next;
	int rc;

	list_for_each_entry_safe(req, next, list, link) {
		if (vtee_is_call(req) && vt->calls >= vt->max_calls)
			return;
		rc = vtee_place(vt, req);
		if (rc == -ENOSPC)
			return;
		list_del_init(&req->link);
		if (rc) {
			req->error = rc;
			vtee_returned(vt, req);
		}
	}
}

static void vtee_flush(struct vtee *vt)
{
	if (vt->dead)
		return;
	vtee_flush_list(vt, &vt->waiting_controls);
	vtee_flush_list(vt, &vt->waiting_others);
	vtee_flush_list(vt, &vt->waiting_calls);
}

static struct list_head *vtee_waiting(struct vtee *vt, struct vtee_req *req)
{
	if (vtee_is_control(req))
		return &vt->waiting_controls;
	return vtee_is_call(req) ? &vt->waiting_calls : &vt->waiting_others;
}

/* Returns 0; or -ENODEV or -ESTALE, and then the request was not sent and will not be finished. */
int vtee_req_send(struct vtee_req *req)
{
	struct vtee_request_header *header = req->out;
	struct vtee *vt = req->vt;
	unsigned long flags;
	int rc = 0;

	spin_lock_irqsave(&vt->lock, flags);
	if (vt->dead) {
		rc = -ENODEV;
	} else if (req->epoch != vt->epoch) {
		rc = -ESTALE;
	} else {
		req->tag = vt->next_tag++;
		header->tag = cpu_to_le64(req->tag);
		header->epoch = cpu_to_le64(req->epoch);
		req->state = VTEE_WAITING;
		kref_get(&req->ref);
		hash_add(vt->in_flight, &req->hash, req->tag);
		list_add_tail(&req->link, vtee_waiting(vt, req));
		vt->owed += vtee_is_owed(req);
		vtee_flush(vt);
	}
	spin_unlock_irqrestore(&vt->lock, flags);
	return rc;
}

/*
 * Send a request for which nobody waits, and give up the reference to it. On error, @finish is not
 * called.
 */
int vtee_req_post(struct vtee_req *req, void (*finish)(struct vtee_req *req))
{
	int rc;

	req->finish = finish;
	req->orphan = true;
	rc = vtee_req_send(req);
	vtee_req_put(req);
	return rc;
}

/* -- what the device returns */

static void vtee_req_done(struct virtqueue *vq)
{
	struct vtee *vt = vq->vdev->priv;
	struct vtee_req *req;
	unsigned long flags;
	u32 used;

	spin_lock_irqsave(&vt->lock, flags);
	do {
		virtqueue_disable_cb(vq);
		while ((req = virtqueue_get_buf(vq, &used))) {
			req->used = used;
			WRITE_ONCE(vt->silent, false);
			if (vtee_is_call(req))
				vt->calls--;
			vt->owed -= vtee_is_owed(req);
			vtee_returned(vt, req);
		}
	} while (!virtqueue_is_broken(vq) && !virtqueue_enable_cb(vq));
	vtee_flush(vt);
	if (!list_empty(&vt->parked))
		queue_work(vt->wq, &vt->finish_work);
	spin_unlock_irqrestore(&vt->lock, flags);
	if (virtqueue_is_broken(vq))
		vtee_break(vt, "it broke a queue");
}

void vtee_finish_work(struct work_struct *work)
{
	struct vtee *vt = container_of(work, struct vtee, finish_work);
	struct vtee_req *req;

	for (;;) {
		spin_lock_irq(&vt->lock);
		req = list_first_entry_or_null(&vt->finished, struct vtee_req, link);
		if (req)
			list_del_init(&req->link);
		spin_unlock_irq(&vt->lock);
		if (!req)
			break;
		if (req->finish)
			req->finish(req);
		vtee_req_put(req);
	}
	vtee_parked_look(vt);
}

/**
 * vtee_req_answer() - what the device answered
 * @req:	a request that was returned
 * @answer:	filled in
 *
 * Returns 0; -ENODEV or -ESTALE where there is no answer and will not be one; -ECANCELED for a
 * request that the device never saw; -EPROTO for an answer that makes no sense, after which the
 * device is not used any more.
 */
int vtee_req_answer(struct vtee_req *req, struct vtee_answer *answer)
{
	struct vtee_response_header *header = req->answer;

	if (req->error)
		return req->error;
	if (req->used < sizeof(*header) || req->used > req->in_len)
		goto nonsense;
	memcpy(req->answer, req->in, req->used);
	answer->status = le32_to_cpu(header->status);
	answer->ret = le32_to_cpu(header->ret);
	answer->origin = le32_to_cpu(header->origin);
	answer->body = NULL;
	if (answer->status == VTEE_STATUS_OK) {
		if (req->used != req->in_len)
			goto nonsense;
		answer->body = header + 1;
	} else {
		if (answer->ret == TEEC_SUCCESS) {
			answer->ret = TEEC_ERROR_COMMUNICATION;
			answer->origin = TEEC_ORIGIN_COMMS;
		}
		if (answer->status == VTEE_STATUS_STALE_EPOCH)
			queue_work(req->vt->wq, &req->vt->epoch_work);
	}
	return 0;
nonsense:
	vtee_break(req->vt, "it returned a request with a wrong length");
	return -EPROTO;
}

/*
 * Wait for what the device should do soon, also in a process that is dying. A device that was
 * waited for in vain is not waited for again until it answers something.
 */
int vtee_wait_bounded(struct vtee *vt, struct completion *done, long timeout)
{
	if (READ_ONCE(vt->silent))
		return completion_done(done) ? 0 : -ETIMEDOUT;
	if (wait_for_completion_timeout(done, timeout))
		return 0;
	WRITE_ONCE(vt->silent, true);
	dev_warn(&vt->vdev->dev, "the device does not answer\n");
	return -ETIMEDOUT;
}

/*
 * Wait for a request that was sent; what has not been returned then will be finished by the driver.
 */
static int vtee_req_wait(struct vtee_req *req, unsigned int state, long timeout)
{
	struct vtee *vt = req->vt;
	int rc;

	if (timeout)
		rc = vtee_wait_bounded(vt, &req->done, timeout);
	else
		rc = wait_for_completion_state(&req->done, state) ? -EINTR : 0;
	if (!rc)
		return 0;
	spin_lock_irq(&vt->lock);
	if (req->state == VTEE_RETURNED) {
		rc = 0;
	} else {
		req->orphan = true;
		rc = req->error ?: rc;
	}
	spin_unlock_irq(&vt->lock);
	return rc;
}

/**
 * vtee_req_call() - send a request and wait for its answer
 * @req:	its @finish is called if the device returns it after the caller has gone
 * @answer:	filled in if 0 is returned
 *
 * Only a signal that kills ends the wait early: a call must not be made twice because of a signal.
 * Returns as vtee_req_answer(), or -EINTR.
 */
int vtee_req_call(struct vtee_req *req, struct vtee_answer *answer)
{
	int rc;

	rc = vtee_req_send(req);
	if (!rc)
		rc = vtee_req_wait(req, TASK_KILLABLE | TASK_FREEZABLE, 0);
	return rc ?: vtee_req_answer(req, answer);
}

/* Likewise, also of a process that is dying; returns -ETIMEDOUT after @timeout (in jiffies). */
int vtee_req_call_bounded(struct vtee_req *req, struct vtee_answer *answer, long timeout)
{
	int rc;

	rc = vtee_req_send(req);
	if (!rc)
		rc = vtee_req_wait(req, 0, timeout);
	return rc ?: vtee_req_answer(req, answer);
}

/* -- cancelling */

static void vtee_nothing(struct vtee_req *req)
{
}

void vtee_cancel_tag(struct vtee *vt, struct vtee_ctx *ctx, u64 tag)
{
	struct vtee_cancel *body;
	struct vtee_req *req;

	req = vtee_req_alloc(vt, ctx, VTEE_REQUEST_CANCEL, sizeof(*body), 0, 0);
	if (!req)
		return;
	body = vtee_req_body(req);
	body->tag = cpu_to_le64(tag);
	vtee_req_post(req, vtee_nothing);
}

static struct vtee_req *vtee_find_call(struct vtee *vt, struct vtee_ctx *ctx, u32 session,
				       u32 cancel_id)
{
	struct vtee_req *req;
	int bucket;

	hash_for_each(vt->in_flight, bucket, req, hash)
		if (vtee_is_call(req) && req->ctx == ctx && req->session == session &&
		    req->cancel_id == cancel_id && !req->cancelled && !req->orphan)
			return req;
	return NULL;
}

/* Cancel the calls that a client means; false where there is none. */
bool vtee_req_cancel(struct vtee *vt, struct vtee_ctx *ctx, u32 session, u32 cancel_id)
{
	struct vtee_req *req;
	bool any = false;
	bool sent;
	u64 tag;

	for (;;) {
		spin_lock_irq(&vt->lock);
		req = vtee_find_call(vt, ctx, session, cancel_id);
		if (req) {
			req->cancelled = true;
			tag = req->tag;
			sent = req->state == VTEE_SENT;
			if (!sent) { /* the device has not seen it */
				list_del_init(&req->link);
				req->error = -ECANCELED;
				vtee_returned(vt, req);
			}
		}
		spin_unlock_irq(&vt->lock);
		if (!req)
			return any;
		if (sent)
			vtee_cancel_tag(vt, ctx, tag);
		any = true;
	}
}

/* -- the end of an epoch, or of the device */

bool vtee_epoch_in_flight(struct vtee *vt, u64 epoch)
{
	struct vtee_req *req;
	bool found = false;
	int bucket;

	spin_lock_irq(&vt->lock);
	hash_for_each(vt->in_flight, bucket, req, hash)
		found |= req->epoch == epoch;
	spin_unlock_irq(&vt->lock);
	return found;
}

/*
 * Nobody waits any longer for what was asked for in other epochs than @epoch; the device still
 * returns it.
 */
void vtee_abandon_epoch(struct vtee *vt, u64 epoch)
{
	struct hlist_node *next;
	struct vtee_req *req;
	int bucket;

	spin_lock_irq(&vt->lock);
	vt->epoch = epoch;
	hash_for_each_safe(vt->in_flight, bucket, next, req, hash) {
		if (req->epoch == epoch)
			continue;
		req->error = -ESTALE;
		if (req->state == VTEE_WAITING) {
			list_del_init(&req->link);
			vt->owed -= vtee_is_owed(req);
			vtee_returned(vt, req);
		} else if (!req->orphan) {
			req->orphan = true;
			complete(&req->done);
		}
	}
	spin_unlock_irq(&vt->lock);
}

static void vtee_detach(struct virtqueue *vq)
{
	while (virtqueue_detach_unused_buf(vq))
		;
}

/* The device was reset: the queues are to forget what they hold. */
void vtee_detach_all(struct vtee *vt)
{
	unsigned int i;

	spin_lock_irq(&vt->lock);
	vtee_detach(vt->control);
	for (i = 0; i < vt->num_request; i++)
		vtee_detach(vt->request[i]);
	spin_unlock_irq(&vt->lock);
}

/* Likewise: it returns nothing any more. */
void vtee_fail_all(struct vtee *vt)
{
	struct hlist_node *next;
	struct vtee_req *req;
	int bucket;

	spin_lock_irq(&vt->lock);
	hash_for_each_safe(vt->in_flight, bucket, next, req, hash) {
		list_del_init(&req->link);
		req->error = -ENODEV;
		vtee_returned(vt, req);
	}
	vt->calls = 0;
	vt->owed = 0;
	spin_unlock_irq(&vt->lock);
}

/* -- the queues themselves */

static int vtee_try_queues(struct vtee *vt, unsigned int num_request)
{
	struct virtqueue_info info[VTEE_QUEUE_REQUEST + VTEE_MAX_REQUEST_QUEUES] = {
		[VTEE_QUEUE_CONTROL] = { .name = "control", .callback = vtee_req_done },
		[VTEE_QUEUE_EVENT] = { .name = "event", .callback = vtee_event_done },
	};
	struct virtqueue *vqs[VTEE_QUEUE_REQUEST + VTEE_MAX_REQUEST_QUEUES];
	unsigned int i;
	int rc;

	for (i = 0; i < num_request; i++) {
		info[VTEE_QUEUE_REQUEST + i].name = "request";
		info[VTEE_QUEUE_REQUEST + i].callback = vtee_req_done;
	}
	rc = vtee_find_vqs(vt->vdev, VTEE_QUEUE_REQUEST + num_request, vqs, info);
	if (rc)
		return rc;
	vt->control = vqs[VTEE_QUEUE_CONTROL];
	vt->event = vqs[VTEE_QUEUE_EVENT];
	memcpy(vt->request, vqs + VTEE_QUEUE_REQUEST, num_request * sizeof(vqs[0]));
	vt->num_request = num_request;
	vt->ring_size = U32_MAX;
	for (i = 0; i < num_request; i++)
		vt->ring_size = min(vt->ring_size, virtqueue_get_vring_size(vt->request[i]));
	return 0;
}

/*
 * One request queue for each CPU; fewer where the hypervisor has been told to make fewer than the
 * device could serve.
 */
int vtee_find_queues(struct vtee *vt)
{
	unsigned int count =
		min3(vt->config_queues, num_online_cpus(), (unsigned int)VTEE_MAX_REQUEST_QUEUES);
	int rc;

	do {
		rc = vtee_try_queues(vt, count);
		count /= 2;
	} while (rc == -ENOENT && count);
	return rc;
}
