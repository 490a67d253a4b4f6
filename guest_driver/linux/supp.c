// SPDX-License-Identifier: GPL-2.0-only
/*
 * The supplicant: one process at a time that has /dev/teeprivN open. It gets RPCs in the form that
 * OP-TEE's driver gives them, so that OP-TEE's tee-supplicant serves them: memory is named by the
 * id of a tee_shm of its own.
 */
#include <linux/sched/signal.h>
#include <linux/slab.h>

#include "virtio_tee.h"

#define VTEE_META (TEE_IOCTL_PARAM_ATTR_TYPE_VALUE_INOUT | TEE_IOCTL_PARAM_ATTR_META)

struct vtee_supp_req {
	struct list_head link;
	int id;
	u32 func;
	struct vtee_rpc *rpc; /* NULL once nobody wants the answer */
	unsigned int num_params;
	struct tee_param param[];
};

void vtee_supp_init(struct vtee_supp *supp)
{
	INIT_LIST_HEAD(&supp->queued);
	idr_init(&supp->requests);
	xa_init(&supp->stand_ins);
	init_waitqueue_head(&supp->wait);
	supp->in_hand = -1;
}

static struct vtee *vtee_of_supp(struct tee_context *tctx)
{
	return tee_get_drvdata(tctx->teedev);
}

/* -- coming and going */

int vtee_supp_open(struct vtee *vt, struct tee_context *tctx)
{
	int rc = 0;

	mutex_lock(&vt->rpc_lock);
	if (vt->supp.ctx)
		rc = -EBUSY;
	else
		vt->supp.ctx = tctx;
	mutex_unlock(&vt->rpc_lock);
	return rc;
}

static void vtee_supp_end(struct vtee_supp *supp, struct vtee_supp_req *req)
{
	idr_remove(&supp->requests, req->id);
	list_del(&req->link);
	if (req->rpc)
		req->rpc->supp = NULL;
	kfree(req);
}

void vtee_supp_release(struct vtee *vt)
{
	struct vtee_supp *supp = &vt->supp;
	struct vtee_supp_req *req;
	struct tee_shm *stand_in;
	struct vtee_rpc *rpc;
	unsigned long index;
	int id;

	mutex_lock(&vt->rpc_lock);
	supp->ctx = NULL;
	supp->in_hand = -1;
	idr_for_each_entry(&supp->requests, req, id) {
		rpc = req->rpc;
		vtee_supp_end(supp, req);
		if (rpc)
			vtee_rpc_gone(vt, rpc);
	}
	xa_for_each(&supp->stand_ins, index, stand_in) {
		xa_erase(&supp->stand_ins, index);
		kfree(stand_in);
	}
	mutex_unlock(&vt->rpc_lock);
}

/* -- what it is asked for; with rpc_lock held */

static struct vtee_supp_req *vtee_supp_queue(struct vtee_supp *supp, u32 func, struct vtee_rpc *rpc,
					     unsigned int num_params)
{
	struct vtee_supp_req *req;

	req = kzalloc(struct_size(req, param, num_params), GFP_KERNEL);
	if (!req)
		return NULL;
	req->id = idr_alloc(&supp->requests, req, 1, 0, GFP_KERNEL);
	if (req->id < 0) {
		kfree(req);
		return NULL;
	}
	req->func = func;
	req->rpc = rpc;
	if (rpc)
		rpc->supp = req;
	req->num_params = num_params;
	list_add_tail(&req->link, &supp->queued);
	return req;
}

/*
 * The TEE core reads the id of a tee_shm after supp_recv() has returned. The tee_shm itself must
 * not be held for that: it would hold the supplicant's context, and nobody would learn of its
 * death. So the core gets one that has nothing but the id, and stays until the supplicant goes.
 */
static struct tee_shm *vtee_supp_stand_in(struct vtee_supp *supp, int id)
{
	struct tee_shm *shm = xa_load(&supp->stand_ins, id);

	if (shm)
		return shm;
	shm = kzalloc(sizeof(*shm), GFP_KERNEL);
	if (!shm)
		return NULL;
	shm->id = id;
	if (xa_is_err(xa_store(&supp->stand_ins, id, shm, GFP_KERNEL))) {
		kfree(shm);
		return NULL;
	}
	return shm;
}

static bool vtee_supp_param(struct vtee_supp *supp, struct tee_param *param,
			    const struct vtee_param *wire, struct vtee_region *region)
{
	param->attr = le64_to_cpu(wire->attr);
	switch (param->attr) {
	case TEE_IOCTL_PARAM_ATTR_TYPE_VALUE_INPUT:
	case TEE_IOCTL_PARAM_ATTR_TYPE_VALUE_INOUT:
		param->u.value.a = le64_to_cpu(wire->a);
		param->u.value.b = le64_to_cpu(wire->b);
		param->u.value.c = le64_to_cpu(wire->c);
		break;
	case TEE_IOCTL_PARAM_ATTR_TYPE_MEMREF_INPUT:
	case TEE_IOCTL_PARAM_ATTR_TYPE_MEMREF_OUTPUT:
	case TEE_IOCTL_PARAM_ATTR_TYPE_MEMREF_INOUT:
		param->u.memref.size = le64_to_cpu(wire->b);
		if (!region)
			break;
		/* A client's memory cannot be named to the supplicant. */
		if (region->ctx != supp->ctx->data || region->shm_id < 0)
			return false;
		vtee_region_sync_cpu(region, le64_to_cpu(wire->a), le64_to_cpu(wire->b));
		param->u.memref.shm_offs = le64_to_cpu(wire->a);
		param->u.memref.shm = vtee_supp_stand_in(supp, region->shm_id);
		return param->u.memref.shm;
	}
	return true;
}

static bool vtee_supp_ask_alloc(struct vtee_supp *supp, struct vtee_rpc *rpc)
{
	struct vtee_supp_req *req;
	u64 type;

	if (rpc->num_params != 1 ||
	    le64_to_cpu(rpc->param[0].attr) != TEE_IOCTL_PARAM_ATTR_TYPE_VALUE_INPUT)
		return false;
	type = le64_to_cpu(rpc->param[0].a);
	if (type != VTEE_SHM_APPLICATION && type != VTEE_SHM_GLOBAL)
		return false;
	req = vtee_supp_queue(supp, rpc->command, rpc, 1);
	if (!req)
		return false;
	req->param[0].attr = TEE_IOCTL_PARAM_ATTR_TYPE_VALUE_INOUT;
	req->param[0].u.value.a = type;
	req->param[0].u.value.b = le64_to_cpu(rpc->param[0].b);
	return true;
}

static bool vtee_supp_ask_other(struct vtee_supp *supp, struct vtee_rpc *rpc)
{
	struct vtee_supp_req *req;
	unsigned int i;

	req = vtee_supp_queue(supp, rpc->command, rpc, rpc->num_params);
	if (!req)
		return false;
	for (i = 0; i < rpc->num_params; i++) {
		if (!vtee_supp_param(supp, &req->param[i], &rpc->param[i], rpc->region[i])) {
			vtee_supp_end(supp, req);
			return false;
		}
	}
	return true;
}

/* Hand an RPC to the supplicant. False where there is none, or it cannot be asked that. */
bool vtee_supp_ask(struct vtee *vt, struct vtee_rpc *rpc)
{
	struct vtee_supp *supp = &vt->supp;
	bool asked;

	if (!supp->ctx)
		return false;
	if (rpc->command == VTEE_RPC_SHM_ALLOC)
		asked = vtee_supp_ask_alloc(supp, rpc);
	else
		asked = vtee_supp_ask_other(supp, rpc);
	if (asked)
		wake_up(&supp->wait);
	return asked;
}

/* Have it free memory. @rpc: the RPC that this answers, or NULL. */
bool vtee_supp_free(struct vtee *vt, int shm_id, u32 type, struct vtee_rpc *rpc)
{
	struct vtee_supp *supp = &vt->supp;
	struct vtee_supp_req *req;

	if (!supp->ctx)
		return false;
	req = vtee_supp_queue(supp, VTEE_RPC_SHM_FREE, rpc, 1);
	if (!req)
		return false;
	req->param[0].attr = TEE_IOCTL_PARAM_ATTR_TYPE_VALUE_INOUT;
	req->param[0].u.value.a = type;
	req->param[0].u.value.b = shm_id;
	wake_up(&supp->wait);
	return true;
}

/* Nobody wants the answer any more; memory is freed all the same. */
void vtee_supp_forget(struct vtee *vt, struct vtee_rpc *rpc)
{
	struct vtee_supp_req *req = rpc->supp;

	if (!req)
		return;
	rpc->supp = NULL;
	req->rpc = NULL;
	if (!list_empty(&req->link) && req->func != VTEE_RPC_SHM_FREE)
		vtee_supp_end(&vt->supp, req);
}

/* -- the system calls */

/*
 * As OP-TEE's driver: all empty, and the first one META where the supplicant can do several at a
 * time.
 */
static int vtee_supp_check_recv(u32 num_params, struct tee_param *params)
{
	int rc = num_params ? 0 : -EINVAL;
	u32 i;

	for (i = 0; i < num_params; i++) {
		if (tee_param_is_memref(&params[i]) && params[i].u.memref.shm)
			tee_shm_put(params[i].u.memref.shm);
		if (params[i].attr && params[i].attr != TEE_IOCTL_PARAM_ATTR_META)
			rc = -EINVAL;
	}
	return rc;
}

/* The first request for which there is room; the others can never be taken. With rpc_lock held. */
static struct vtee_supp_req *vtee_supp_next(struct vtee *vt, u32 room)
{
	struct vtee_supp *supp = &vt->supp;
	struct vtee_supp_req *req;
	struct vtee_rpc *rpc;

	while ((req = list_first_entry_or_null(&supp->queued, struct vtee_supp_req, link))) {
		if (req->num_params <= room) {
			list_del_init(&req->link);
			return req;
		}
		rpc = req->rpc;
		vtee_supp_end(supp, req);
		if (rpc)
			vtee_rpc_gone(vt, rpc);
	}
	return NULL;
}

int vtee_supp_recv(struct tee_context *tctx, u32 *func, u32 *num_params, struct tee_param *params)
{
	struct vtee *vt = vtee_of_supp(tctx);
	struct vtee_supp *supp = &vt->supp;
	struct vtee_supp_req *req;
	u32 meta;
	int rc;

	rc = vtee_supp_check_recv(*num_params, params);
	if (rc)
		return rc;
	meta = params[0].attr == TEE_IOCTL_PARAM_ATTR_META;
	for (;;) {
		rc = wait_event_interruptible(supp->wait,
					      !list_empty(&supp->queued) || READ_ONCE(vt->dead));
		if (rc)
			return rc;
		mutex_lock(&vt->rpc_lock);
		if (READ_ONCE(vt->dead))
			rc = -ENODEV;
		else if (supp->in_hand >= 0)
			rc = -EINVAL; /* it has not answered what it has got */
		req = rc ? NULL : vtee_supp_next(vt, *num_params - meta);
		if (rc || req)
			break;
		mutex_unlock(&vt->rpc_lock);
	}
	if (req) {
		if (meta) {
			params[0].attr = VTEE_META;
			params[0].u.value.a = req->id;
			params[0].u.value.b = 0;
			params[0].u.value.c = 0;
		} else {
			supp->in_hand = req->id;
		}
		*func = req->func;
		*num_params = req->num_params + meta;
		memcpy(params + meta, req->param, req->num_params * sizeof(*params));
	}
	mutex_unlock(&vt->rpc_lock);
	return rc;
}

/*
 * Which request is it that the supplicant answers? It is in its hands no more. With rpc_lock held.
 */
static struct vtee_supp_req *vtee_supp_answered(struct vtee_supp *supp, u32 num_params,
						const struct tee_param *params, u32 *meta)
{
	struct vtee_supp_req *req;
	u64 id = supp->in_hand;

	*meta = supp->in_hand < 0;
	if (*meta) {
		if (!num_params || params[0].attr != VTEE_META)
			return ERR_PTR(-EINVAL);
		id = params[0].u.value.a;
	}
	req = id <= INT_MAX ? idr_find(&supp->requests, id) : NULL;
	if (!req || !list_empty(&req->link))
		return ERR_PTR(-ENOENT);
	if (num_params - *meta != req->num_params)
		return ERR_PTR(-EINVAL);
	idr_remove(&supp->requests, req->id);
	supp->in_hand = -1;
	return req;
}

/* The region of the memory that answers a SHM_ALLOC, in use; NULL if it is none. */
static struct vtee_region *vtee_supp_allocated(struct tee_context *tctx,
					       const struct tee_param *param)
{
	struct vtee_region *region;
	struct tee_shm *shm;

	if (param->u.value.c > INT_MAX)
		return NULL;
	shm = tee_shm_get_from_id(tctx, param->u.value.c);
	if (IS_ERR(shm))
		return NULL;
	region = vtee_region_of(shm);
	if (region) {
		vtee_region_use(region);
		region->shm_id = shm->id;
	}
	tee_shm_put(shm);
	return region;
}

/* Is it as large, and aligned, as the TEE has asked for? */
static bool vtee_supp_memory_fits(const struct vtee_rpc *rpc, const struct vtee_region *region)
{
	u64 align = le64_to_cpu(rpc->param[0].c) ?: 1;

	return le64_to_cpu(rpc->param[0].b) <= region->size && is_power_of_2(align) &&
	       align <= PAGE_SIZE && IS_ALIGNED(region->sgt.sgl->offset, align);
}

static void vtee_supp_take_memory(struct vtee *vt, struct vtee_supp_req *req, u32 ret,
				  struct vtee_region *region)
{
	struct vtee_rpc *rpc = req->rpc;

	if (rpc && ret)
		vtee_rpc_answer(vt, rpc, ret, NULL, 0);
	else if (rpc && region && vtee_supp_memory_fits(rpc, region) &&
		 !vtee_lend(vt, rpc, region, le64_to_cpu(rpc->param[0].b)))
		return;
	else if (rpc)
		vtee_rpc_answer(vt, rpc, TEEC_ERROR_OUT_OF_MEMORY, NULL, 0);
	/* It was too late, or is of no use. */
	if (region && region->shm_id >= 0)
		vtee_supp_free(vt, region->shm_id, req->param[0].u.value.a, NULL);
}

static void vtee_supp_take_other(struct vtee *vt, struct vtee_supp_req *req, u32 ret,
				 const struct tee_param *params)
{
	struct vtee_rpc *rpc = req->rpc;
	struct vtee_param *wire = rpc->param;
	unsigned int i;

	if (rpc->command == VTEE_RPC_SHM_FREE) {
		vtee_rpc_answer(vt, rpc, ret, NULL, 0);
		return;
	}
	for (i = 0; i < rpc->num_params; i++) {
		switch (le64_to_cpu(wire[i].attr)) {
		case TEE_IOCTL_PARAM_ATTR_TYPE_VALUE_OUTPUT:
		case TEE_IOCTL_PARAM_ATTR_TYPE_VALUE_INOUT:
			wire[i].a = cpu_to_le64(params[i].u.value.a);
			wire[i].b = cpu_to_le64(params[i].u.value.b);
			wire[i].c = cpu_to_le64(params[i].u.value.c);
			break;
		case TEE_IOCTL_PARAM_ATTR_TYPE_MEMREF_OUTPUT:
		case TEE_IOCTL_PARAM_ATTR_TYPE_MEMREF_INOUT:
			if (rpc->region[i])
				vtee_region_sync_device(rpc->region[i], le64_to_cpu(wire[i].a),
							le64_to_cpu(wire[i].b));
			/* OP-TEE's supplicant says so by the size alone. */
			if (rpc->region[i] && params[i].u.memref.size > le64_to_cpu(wire[i].b) &&
			    !ret)
				ret = TEEC_ERROR_SHORT_BUFFER;
			wire[i].b = cpu_to_le64(params[i].u.memref.size);
			break;
		}
	}
	vtee_rpc_answer(vt, rpc, ret, wire, rpc->num_params);
}

/* What the supplicant changed: types are those of the request, whatever it says. */
static bool vtee_supp_same_types(const struct vtee_supp_req *req, const struct tee_param *params)
{
	unsigned int i;

	for (i = 0; i < req->num_params; i++)
		if (params[i].attr != req->param[i].attr)
			return false;
	return true;
}

int vtee_supp_send(struct tee_context *tctx, u32 ret, u32 num_params, struct tee_param *params)
{
	struct vtee *vt = vtee_of_supp(tctx);
	struct vtee_region *region = NULL;
	struct vtee_supp_req *req;
	u32 meta;

	mutex_lock(&vt->rpc_lock);
	req = vtee_supp_answered(&vt->supp, num_params, params, &meta);
	mutex_unlock(&vt->rpc_lock);
	if (IS_ERR(req))
		return PTR_ERR(req);
	params += meta;
	if (!vtee_supp_same_types(req, params))
		ret = TEEC_ERROR_BAD_PARAMETERS;
	/* Not with the lock held: the supplicant may be giving it up at the same time. */
	else if (req->func == VTEE_RPC_SHM_ALLOC && ret == TEEC_SUCCESS)
		region = vtee_supp_allocated(tctx, params);

	mutex_lock(&vt->rpc_lock);
	if (req->rpc)
		req->rpc->supp = NULL;
	if (req->func == VTEE_RPC_SHM_ALLOC)
		vtee_supp_take_memory(vt, req, ret, region);
	else if (req->rpc)
		vtee_supp_take_other(vt, req, ret, params);
	mutex_unlock(&vt->rpc_lock);
	if (region)
		vtee_region_unuse(region);
	kfree(req);
	return 0;
}
