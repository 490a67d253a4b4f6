// SPDX-License-Identifier: GPL-2.0-only
/*
 * Parameters of calls: from the TEE core's form to the device's, and what the device may change of
 * them back.
 */
#include "virtio_tee.h"

static bool vtee_is_memref(u64 attr)
{
	attr &= VTEE_PARAM_TYPE_MASK;
	return attr >= TEE_IOCTL_PARAM_ATTR_TYPE_MEMREF_INPUT &&
	       attr <= TEE_IOCTL_PARAM_ATTR_TYPE_MEMREF_INOUT;
}

static bool vtee_is_written(u64 attr)
{
	return vtee_is_memref(attr) &&
	       (attr & VTEE_PARAM_TYPE_MASK) != TEE_IOCTL_PARAM_ATTR_TYPE_MEMREF_INPUT;
}

/* @region: the memory of a memory reference, NULL for a NULL reference */
static void vtee_param_out(struct vtee_param *wire, const struct tee_param *param,
			   const struct vtee_region *region)
{
	memset(wire, 0, sizeof(*wire));
	wire->attr = cpu_to_le64(param->attr);
	switch (param->attr & VTEE_PARAM_TYPE_MASK) {
	case TEE_IOCTL_PARAM_ATTR_TYPE_VALUE_INPUT:
	case TEE_IOCTL_PARAM_ATTR_TYPE_VALUE_INOUT:
		wire->a = cpu_to_le64(param->u.value.a);
		wire->b = cpu_to_le64(param->u.value.b);
		wire->c = cpu_to_le64(param->u.value.c);
		break;
	case TEE_IOCTL_PARAM_ATTR_TYPE_MEMREF_INPUT:
	case TEE_IOCTL_PARAM_ATTR_TYPE_MEMREF_OUTPUT:
	case TEE_IOCTL_PARAM_ATTR_TYPE_MEMREF_INOUT:
		wire->a = cpu_to_le64(region ? param->u.memref.shm_offs : 0);
		wire->b = cpu_to_le64(param->u.memref.size);
		wire->c = cpu_to_le64(region ? region->id : VTEE_NULL_REGION);
		break;
	}
}

static int vtee_param_region(struct vtee_req *req, const struct tee_param *param,
			     struct vtee_region **found)
{
	const struct tee_param_memref *memref = &param->u.memref;
	struct vtee_region *region;

	*found = NULL;
	if (!memref->shm)
		return 0;
	region = vtee_region_of(memref->shm);
	/* Clients in the kernel are not checked by the TEE core. */
	if (!region || region->ctx != req->ctx)
		return -EINVAL;
	if (memref->shm_offs > region->size || memref->size > region->size - memref->shm_offs)
		return -EINVAL;
	if (region->epoch != req->epoch)
		return -ESTALE;
	*found = region;
	return 0;
}

/**
 * vtee_params_out() - write a call's parameters into its request
 * @req:	keeps the memory that they name in use until vtee_params_done(); has @count places
 * @wire:	where they go
 * @params:	parameters of a client
 * @count:	how many
 *
 * Returns 0, -EINVAL for what cannot be sent, or -ESTALE for memory that the device has forgotten.
 */
int vtee_params_out(struct vtee_req *req, struct vtee_param *wire, const struct tee_param *params,
		    unsigned int count)
{
	struct vtee_region *region;
	unsigned int i;
	int rc;

	for (i = 0; i < count; i++) {
		region = NULL;
		if ((params[i].attr & ~(u64)(VTEE_PARAM_TYPE_MASK | VTEE_PARAM_META)) ||
		    (params[i].attr & VTEE_PARAM_TYPE_MASK) >
			    TEE_IOCTL_PARAM_ATTR_TYPE_MEMREF_INOUT)
			return -EINVAL;
		if (vtee_is_memref(params[i].attr)) {
			rc = vtee_param_region(req, &params[i], &region);
			if (rc)
				return rc;
		}
		vtee_param_out(&wire[i], &params[i], region);
		if (region) {
			vtee_region_use(region);
			vtee_region_sync_device(region, params[i].u.memref.shm_offs,
						params[i].u.memref.size);
			req->span[req->num_spans++] = (struct vtee_span){
				.region = region,
				.offset = params[i].u.memref.shm_offs,
				.size = params[i].u.memref.size,
				.written = vtee_is_written(params[i].attr),
			};
		}
	}
	return 0;
}

/* The device has written what it has to write: let this CPU see it. */
void vtee_params_sync_cpu(struct vtee_req *req)
{
	const struct vtee_span *span;

	for (span = req->span; span < req->span + req->num_spans; span++)
		if (span->written)
			vtee_region_sync_cpu(span->region, span->offset, span->size);
}

void vtee_params_done(struct vtee_req *req)
{
	while (req->num_spans)
		vtee_region_unuse(req->span[--req->num_spans].region);
}

/* May the device answer @sent with @got? */
static bool vtee_param_fits(const struct vtee_param *sent, const struct vtee_param *got, u32 ret)
{
	u64 attr = le64_to_cpu(sent->attr);

	if (!memcmp(sent, got, sizeof(*sent)))
		return true;
	if (got->attr != sent->attr || attr & VTEE_PARAM_META)
		return false;
	switch (attr) {
	case TEE_IOCTL_PARAM_ATTR_TYPE_VALUE_OUTPUT:
	case TEE_IOCTL_PARAM_ATTR_TYPE_VALUE_INOUT:
		return true;
	case TEE_IOCTL_PARAM_ATTR_TYPE_MEMREF_OUTPUT:
	case TEE_IOCTL_PARAM_ATTR_TYPE_MEMREF_INOUT:
		return got->a == sent->a && got->c == sent->c && le64_to_cpu(got->b) <= SIZE_MAX &&
		       (ret == TEEC_ERROR_SHORT_BUFFER ||
			le64_to_cpu(got->b) <= le64_to_cpu(sent->b));
	default:
		return false;
	}
}

static struct vtee_region *vtee_param_region_of(const struct tee_param *param)
{
	return vtee_is_memref(param->attr) && param->u.memref.shm ?
		       vtee_region_of(param->u.memref.shm) :
		       NULL;
}

/**
 * vtee_params_in() - take a response's parameters
 * @req:	the call
 * @wire:	the response's parameters, where the device cannot change them any more
 * @params:	the client's, as they were sent: the device could have changed its copy
 * @count:	how many
 * @ret:	the call's result
 *
 * Returns 0, or -EPROTO where the device changed what it may not; then no parameter has changed.
 */
int vtee_params_in(struct vtee_req *req, const struct vtee_param *wire, struct tee_param *params,
		   unsigned int count, u32 ret)
{
	struct vtee_param sent;
	unsigned int i;

	for (i = 0; i < count; i++) {
		vtee_param_out(&sent, &params[i], vtee_param_region_of(&params[i]));
		if (!vtee_param_fits(&sent, &wire[i], ret)) {
			vtee_break(req->vt, "it changed what it may not in a parameter");
			return -EPROTO;
		}
	}
	for (i = 0; i < count; i++) {
		switch (params[i].attr) {
		case TEE_IOCTL_PARAM_ATTR_TYPE_VALUE_OUTPUT:
		case TEE_IOCTL_PARAM_ATTR_TYPE_VALUE_INOUT:
			params[i].u.value.a = le64_to_cpu(wire[i].a);
			params[i].u.value.b = le64_to_cpu(wire[i].b);
			params[i].u.value.c = le64_to_cpu(wire[i].c);
			break;
		case TEE_IOCTL_PARAM_ATTR_TYPE_MEMREF_OUTPUT:
		case TEE_IOCTL_PARAM_ATTR_TYPE_MEMREF_INOUT:
			params[i].u.memref.size = le64_to_cpu(wire[i].b);
			break;
		}
	}
	return 0;
}
