// SPDX-License-Identifier: GPL-2.0-only
/*
 * What the TEE asks of the guest. Some of it the driver answers itself, all else goes to the
 * supplicant. An RPC is here until it was answered, withdrawn, or its epoch ends.
 */
#include <linux/jiffies.h>
#include <linux/slab.h>
#include <linux/timekeeping.h>

#include "virtio_tee.h"

#define VTEE_NOTIFICATION_WAIT 0
#define VTEE_NOTIFICATION_SEND 1

static void vtee_rpc_free(struct vtee *vt, struct vtee_rpc *rpc)
{
	unsigned int i;

	xa_erase(&vt->rpcs, rpc->id);
	vt->num_rpcs--;
	list_del(&rpc->timed);
	for (i = 0; i < rpc->num_params; i++)
		if (rpc->region[i])
			vtee_region_unuse(rpc->region[i]);
	kfree(rpc->region);
	kfree(rpc);
}

/* -- answers */

static void vtee_rpc_answered(struct vtee_req *req)
{
	struct vtee *vt = req->vt;
	struct vtee_answer answer;

	if (!req->data || (!vtee_req_answer(req, &answer) && answer.status == VTEE_STATUS_OK))
		return;
	mutex_lock(&vt->rpc_lock);
	vtee_lent_refused(vt, (uintptr_t)req->data);
	mutex_unlock(&vt->rpc_lock);
}

/**
 * vtee_rpc_answer() - answer an RPC and forget it
 * @vt:		the device
 * @rpc:	the RPC
 * @ret:	result code
 * @params:	the reply's parameters
 * @count:	how many; none are sent with results that have none
 *
 * Where there is no memory for an answer, the device's deadline is the answer.
 */
void vtee_rpc_answer(struct vtee *vt, struct vtee_rpc *rpc, u32 ret,
		     const struct vtee_param *params, unsigned int count)
{
	bool lends = rpc->command == VTEE_RPC_SHM_ALLOC && ret == TEEC_SUCCESS;
	struct vtee_rpc_reply *body;
	struct vtee_req *req;

	if (ret != TEEC_SUCCESS && ret != TEEC_ERROR_SHORT_BUFFER)
		count = 0;
	req = vtee_req_alloc(vt, NULL, VTEE_REQUEST_RPC_REPLY,
			     sizeof(*body) + count * sizeof(*params), 0, 0);
	if (req) {
		req->epoch = rpc->epoch;
		body = vtee_req_body(req);
		body->rpc = cpu_to_le32(rpc->id);
		body->ret = cpu_to_le32(ret);
		body->origin = cpu_to_le32(TEEC_ORIGIN_COMMS);
		body->num_params = cpu_to_le32(count);
		memcpy(body + 1, params, count * sizeof(*params));
		req->data = lends ? (void *)(uintptr_t)rpc->id : NULL;
	}
	if ((!req || vtee_req_post(req, vtee_rpc_answered)) && lends)
		vtee_lent_refused(vt, rpc->id);
	vtee_rpc_free(vt, rpc);
}

/* An error as the specification has it for a command that nobody serves. */
static void vtee_rpc_unserved(struct vtee *vt, struct vtee_rpc *rpc)
{
	u32 ret;

	switch (rpc->command) {
	case VTEE_RPC_LOAD_TA:
		ret = TEEC_ERROR_ITEM_NOT_FOUND;
		break;
	case VTEE_RPC_SHM_ALLOC:
		ret = TEEC_ERROR_OUT_OF_MEMORY;
		break;
	case VTEE_RPC_SHM_FREE:
		ret = TEEC_SUCCESS;
		break;
	default:
		ret = TEEC_ERROR_NOT_SUPPORTED;
		break;
	}
	vtee_rpc_answer(vt, rpc, ret, NULL, 0);
}

/* The supplicant has gone while it had the RPC. */
void vtee_rpc_gone(struct vtee *vt, struct vtee_rpc *rpc)
{
	u32 ret = rpc->command == VTEE_RPC_SHM_FREE ? TEEC_SUCCESS : TEEC_ERROR_COMMUNICATION;

	vtee_rpc_answer(vt, rpc, ret, NULL, 0);
}

/* -- what the driver serves itself */

static bool vtee_rpc_has_value(const struct vtee_rpc *rpc, u64 attr)
{
	return rpc->num_params == 1 && le64_to_cpu(rpc->param[0].attr) == attr;
}

static void vtee_rpc_get_time(struct vtee *vt, struct vtee_rpc *rpc)
{
	struct vtee_param param;
	struct timespec64 now;

	if (!vtee_rpc_has_value(rpc, TEE_IOCTL_PARAM_ATTR_TYPE_VALUE_OUTPUT)) {
		vtee_rpc_answer(vt, rpc, TEEC_ERROR_BAD_PARAMETERS, NULL, 0);
		return;
	}
	ktime_get_real_ts64(&now);
	param = rpc->param[0];
	param.a = cpu_to_le64(now.tv_sec);
	param.b = cpu_to_le64(now.tv_nsec);
	param.c = 0;
	vtee_rpc_answer(vt, rpc, TEEC_SUCCESS, &param, 1);
}

static void vtee_rpc_wait(struct vtee *vt, struct vtee_rpc *rpc, u64 milliseconds)
{
	rpc->expires = jiffies + msecs_to_jiffies(min_t(u64, milliseconds, INT_MAX));
	list_add_tail(&rpc->timed, &vt->timed);
	mod_delayed_work(vt->wq, &vt->timer, 0);
}

static void vtee_rpc_suspend(struct vtee *vt, struct vtee_rpc *rpc)
{
	if (vtee_rpc_has_value(rpc, TEE_IOCTL_PARAM_ATTR_TYPE_VALUE_INPUT))
		vtee_rpc_wait(vt, rpc, le64_to_cpu(rpc->param[0].a));
	else
		vtee_rpc_answer(vt, rpc, TEEC_ERROR_BAD_PARAMETERS, NULL, 0);
}

static struct vtee_rpc *vtee_rpc_waiting_for(struct vtee *vt, u64 value)
{
	struct vtee_rpc *rpc;

	list_for_each_entry(rpc, &vt->timed, timed)
		if (rpc->notification == value)
			return rpc;
	return NULL;
}

/* Wake who waits for @value; or the next one who will. False for a value that there is not. */
static bool vtee_notify(struct vtee *vt, u64 value)
{
	struct vtee_rpc *waiting;

	if (value >= VTEE_MAX_NOTIFICATIONS)
		return false;
	waiting = vtee_rpc_waiting_for(vt, value);
	if (waiting)
		vtee_rpc_answer(vt, waiting, TEEC_SUCCESS, waiting->param, waiting->num_params);
	else
		__set_bit(value, vt->notified);
	return true;
}

static void vtee_rpc_notification(struct vtee *vt, struct vtee_rpc *rpc)
{
	u32 ret = TEEC_ERROR_BAD_PARAMETERS;
	u64 value, timeout;

	if (!vtee_rpc_has_value(rpc, TEE_IOCTL_PARAM_ATTR_TYPE_VALUE_INPUT))
		goto out;
	value = le64_to_cpu(rpc->param[0].b);
	timeout = le64_to_cpu(rpc->param[0].c);
	switch (le64_to_cpu(rpc->param[0].a)) {
	case VTEE_NOTIFICATION_SEND:
		if (vtee_notify(vt, value))
			ret = TEEC_SUCCESS;
		break;
	case VTEE_NOTIFICATION_WAIT:
		if (value >= VTEE_MAX_NOTIFICATIONS || vtee_rpc_waiting_for(vt, value))
			break;
		if (!__test_and_clear_bit(value, vt->notified)) {
			rpc->notification = value;
			/* Without a limit of its own, the device's deadline is one. */
			vtee_rpc_wait(vt, rpc, timeout ?: INT_MAX);
			return;
		}
		ret = TEEC_SUCCESS;
		break;
	}
out:
	vtee_rpc_answer(vt, rpc, ret, rpc->param, rpc->num_params);
}

void vtee_notification(struct vtee *vt, const void *data, size_t size)
{
	const struct vtee_notification_event *event = data;

	if (size != sizeof(*event)) {
		vtee_break(vt, "it sent a notification that makes no sense");
		return;
	}
	mutex_lock(&vt->rpc_lock);
	vtee_notify(vt, le32_to_cpu(event->value));
	mutex_unlock(&vt->rpc_lock);
}

void vtee_rpc_timer(struct work_struct *work)
{
	struct vtee *vt = container_of(to_delayed_work(work), struct vtee, timer);
	unsigned long now = jiffies;
	unsigned long next = 0;
	struct vtee_rpc *rpc, *after;
	bool any = false;

	mutex_lock(&vt->rpc_lock);
	list_for_each_entry_safe(rpc, after, &vt->timed, timed) {
		if (time_after_eq(now, rpc->expires)) {
			if (rpc->command == VTEE_RPC_SUSPEND)
				vtee_rpc_answer(vt, rpc, TEEC_SUCCESS, rpc->param, rpc->num_params);
			else
				vtee_rpc_answer(vt, rpc, TEE_ERROR_TIMEOUT, NULL, 0);
		} else if (!any || time_before(rpc->expires, next)) {
			next = rpc->expires;
			any = true;
		}
	}
	if (any)
		mod_delayed_work(vt->wq, &vt->timer, next - now);
	mutex_unlock(&vt->rpc_lock);
}

/* -- what others serve */

static void vtee_rpc_shm_free(struct vtee *vt, struct vtee_rpc *rpc)
{
	struct vtee_region *region = rpc->num_params == 2 ? rpc->region[1] : NULL;
	int shm_id = -1;

	if (region) {
		shm_id = vtee_lent_freed(vt, region);
		/* The supplicant may now take it away. */
		rpc->region[1] = NULL;
		vtee_region_unuse(region);
	}
	if (shm_id < 0 || !vtee_supp_free(vt, shm_id, le64_to_cpu(rpc->param[0].a), rpc))
		vtee_rpc_answer(vt, rpc, TEEC_SUCCESS, NULL, 0);
}

static void vtee_rpc_dispatch(struct vtee *vt, struct vtee_rpc *rpc, u32 target)
{
	if (target != VTEE_TARGET_SUPPLICANT) { /* this driver knows no handlers of clients */
		vtee_rpc_unserved(vt, rpc);
		return;
	}
	switch (rpc->command) {
	case VTEE_RPC_GET_TIME:
		vtee_rpc_get_time(vt, rpc);
		break;
	case VTEE_RPC_NOTIFICATION:
		vtee_rpc_notification(vt, rpc);
		break;
	case VTEE_RPC_SUSPEND:
		vtee_rpc_suspend(vt, rpc);
		break;
	case VTEE_RPC_SHM_FREE:
		vtee_rpc_shm_free(vt, rpc);
		break;
	case VTEE_RPC_RPMB:
	case VTEE_RPC_BENCH_REG:
	case VTEE_RPC_I2C_TRANSFER:
	case VTEE_RPC_RPMB_PROBE_RESET:
	case VTEE_RPC_RPMB_PROBE_NEXT:
	case VTEE_RPC_RPMB_FRAMES:
		vtee_rpc_unserved(vt, rpc);
		break;
	default:
		if (!vtee_supp_ask(vt, rpc))
			vtee_rpc_unserved(vt, rpc);
		break;
	}
}

/* -- events */

static bool vtee_rpc_param_ok(const struct vtee_param *param)
{
	switch (le64_to_cpu(param->attr)) {
	case TEE_IOCTL_PARAM_ATTR_TYPE_NONE:
	case TEE_IOCTL_PARAM_ATTR_TYPE_VALUE_INPUT:
	case TEE_IOCTL_PARAM_ATTR_TYPE_VALUE_OUTPUT:
	case TEE_IOCTL_PARAM_ATTR_TYPE_VALUE_INOUT:
	case TEE_IOCTL_PARAM_ATTR_TYPE_MEMREF_INPUT:
	case TEE_IOCTL_PARAM_ATTR_TYPE_MEMREF_OUTPUT:
	case TEE_IOCTL_PARAM_ATTR_TYPE_MEMREF_INOUT:
		return true;
	default:
		return false;
	}
}

static bool vtee_rpc_is_memref(const struct vtee_param *param)
{
	return le64_to_cpu(param->attr) >= TEE_IOCTL_PARAM_ATTR_TYPE_MEMREF_INPUT;
}

/* Hold the memory that an RPC names. False where it names what it may not. */
static bool vtee_rpc_hold(struct vtee *vt, struct vtee_rpc *rpc)
{
	const struct vtee_param *param;
	struct vtee_region *region;
	unsigned int i;

	for (i = 0; i < rpc->num_params; i++) {
		param = &rpc->param[i];
		if (!vtee_rpc_is_memref(param) || le64_to_cpu(param->c) == VTEE_NULL_REGION)
			continue;
		region = vtee_region_find(vt, le64_to_cpu(param->c));
		rpc->region[i] = region;
		if (!region || le64_to_cpu(param->a) > region->size ||
		    le64_to_cpu(param->b) > region->size - le64_to_cpu(param->a))
			return false;
	}
	return true;
}

static bool vtee_rpc_makes_sense(struct vtee *vt, const struct vtee_rpc_event *event, size_t size)
{
	const struct vtee_param *param = (const struct vtee_param *)(event + 1);
	u32 i, count;

	if (size < sizeof(*event))
		return false;
	count = le32_to_cpu(event->num_params);
	if (count > vt->max_params || size != sizeof(*event) + count * sizeof(*param))
		return false;
	for (i = 0; i < count; i++)
		if (!vtee_rpc_param_ok(&param[i]) &&
		    le32_to_cpu(event->target) == VTEE_TARGET_SUPPLICANT)
			return false;
	return event->rpc && !xa_load(&vt->rpcs, le32_to_cpu(event->rpc)) &&
	       vt->num_rpcs < vt->max_rpcs;
}

static struct vtee_rpc *vtee_rpc_alloc(struct vtee *vt, const struct vtee_rpc_event *event)
{
	u32 count = le32_to_cpu(event->num_params);
	struct vtee_rpc *rpc;

	rpc = kzalloc(struct_size(rpc, param, count), GFP_KERNEL);
	if (!rpc)
		return NULL;
	rpc->region = kcalloc(max(count, 1U), sizeof(*rpc->region), GFP_KERNEL);
	rpc->id = le32_to_cpu(event->rpc);
	if (!rpc->region || xa_is_err(xa_store(&vt->rpcs, rpc->id, rpc, GFP_KERNEL))) {
		kfree(rpc->region);
		kfree(rpc);
		return NULL;
	}
	vt->num_rpcs++;
	INIT_LIST_HEAD(&rpc->timed);
	rpc->epoch = vt->epoch;
	rpc->call = le64_to_cpu(event->call);
	rpc->command = le32_to_cpu(event->command);
	rpc->notification = VTEE_MAX_NOTIFICATIONS;
	rpc->num_params = count;
	memcpy(rpc->param, event + 1, count * sizeof(rpc->param[0]));
	return rpc;
}

void vtee_rpc_event(struct vtee *vt, const void *data, size_t size)
{
	const struct vtee_rpc_event *event = data;
	struct vtee_rpc *rpc;

	mutex_lock(&vt->rpc_lock);
	if (!vtee_rpc_makes_sense(vt, event, size)) {
		mutex_unlock(&vt->rpc_lock);
		vtee_break(vt, "it sent an RPC that makes no sense");
		return;
	}
	rpc = vtee_rpc_alloc(vt, event);
	if (!rpc)
		dev_warn_ratelimited(&vt->vdev->dev, "no memory for an RPC\n");
	else if (rpc->command == VTEE_RPC_SHM_FREE || vtee_rpc_hold(vt, rpc))
		vtee_rpc_dispatch(vt, rpc, le32_to_cpu(event->target));
	else /* perhaps it was there when the event was written */
		vtee_rpc_answer(vt, rpc, TEEC_ERROR_BAD_PARAMETERS, NULL, 0);
	mutex_unlock(&vt->rpc_lock);
}

static void vtee_rpc_forget(struct vtee *vt, struct vtee_rpc *rpc)
{
	vtee_supp_forget(vt, rpc);
	vtee_rpc_free(vt, rpc);
}

void vtee_rpc_withdrawn(struct vtee *vt, const void *data, size_t size)
{
	const struct vtee_rpc_withdrawn_event *event = data;
	struct vtee_rpc_withdrawn_ack *body;
	struct vtee_req *req;
	struct vtee_rpc *rpc;

	/* More than that many answers the device can have left only if it takes none. */
	if (size != sizeof(*event) ||
	    READ_ONCE(vt->owed) > 2 * vt->max_rpcs + virtqueue_get_vring_size(vt->control)) {
		vtee_break(vt, "it withdraws RPCs in a way that makes no sense");
		return;
	}
	mutex_lock(&vt->rpc_lock);
	rpc = xa_load(&vt->rpcs, le32_to_cpu(event->rpc));
	if (rpc)
		vtee_rpc_forget(vt, rpc);
	mutex_unlock(&vt->rpc_lock);
	req = vtee_req_alloc(vt, NULL, VTEE_REQUEST_RPC_WITHDRAWN_ACK, sizeof(*body), 0, 0);
	if (!req)
		return;
	body = vtee_req_body(req);
	body->rpc = event->rpc;
	vtee_req_post(req, NULL);
}

/* The epoch of all RPCs has ended. */
void vtee_rpcs_forget(struct vtee *vt)
{
	struct vtee_rpc *rpc;
	unsigned long id;

	xa_for_each(&vt->rpcs, id, rpc)
		vtee_rpc_forget(vt, rpc);
	bitmap_zero(vt->notified, VTEE_MAX_NOTIFICATIONS);
	vtee_lent_forget(vt);
}
