// SPDX-License-Identifier: GPL-2.0-only
/*
 * Memory of the supplicant's that the TEE has asked for: the TEE has it until it frees it, or the
 * call has ended for which it was, or its answer was not taken. All functions are called with
 * rpc_lock held.
 */
#include <linux/slab.h>

#include "virtio_tee.h"

/* Memory that is for no known call stays only as long as the supplicant lets it. */
static bool vtee_lent_is_held(const struct vtee_lent *lent)
{
	return lent->call;
}

/* Returns the supplicant's id of the memory, or -1 where it has given it up. */
static int vtee_lent_end(struct vtee_lent *lent)
{
	int shm_id = lent->region->shm_id;

	list_del(&lent->link);
	if (vtee_lent_is_held(lent))
		vtee_region_unuse(lent->region);
	kfree(lent);
	return shm_id;
}

/* The TEE will not free it itself: have the supplicant do it. */
static void vtee_lent_return(struct vtee *vt, struct vtee_lent *lent)
{
	u32 type = lent->type;
	int shm_id = vtee_lent_end(lent);

	if (shm_id >= 0)
		vtee_supp_free(vt, shm_id, type, NULL);
}

/*
 * Answer a SHM_ALLOC with the first @size bytes of @region. Returns -ENOMEM, and then nothing has
 * been done.
 */
int vtee_lend(struct vtee *vt, struct vtee_rpc *rpc, struct vtee_region *region, u64 size)
{
	struct vtee_param param = {
		.attr = cpu_to_le64(TEE_IOCTL_PARAM_ATTR_TYPE_MEMREF_INOUT),
		.b = cpu_to_le64(size),
		.c = cpu_to_le64(region->id),
	};
	struct vtee_lent *lent;

	lent = kzalloc(sizeof(*lent), GFP_KERNEL);
	if (!lent)
		return -ENOMEM;
	lent->region = region;
	lent->rpc = rpc->id;
	lent->call = rpc->call;
	lent->type = le64_to_cpu(rpc->param[0].a);
	if (vtee_lent_is_held(lent))
		vtee_region_use(region);
	list_add_tail(&lent->link, &vt->lent);
	vtee_rpc_answer(vt, rpc, TEEC_SUCCESS, &param, 1);
	return 0;
}

/* The TEE frees @region. Returns the supplicant's id of it, or -1 if there is nothing to free. */
int vtee_lent_freed(struct vtee *vt, struct vtee_region *region)
{
	struct vtee_lent *lent;

	list_for_each_entry(lent, &vt->lent, link)
		if (lent->region == region)
			return vtee_lent_end(lent);
	return -1;
}

/* The answer to the SHM_ALLOC @rpc was not taken. */
void vtee_lent_refused(struct vtee *vt, u32 rpc)
{
	struct vtee_lent *lent;

	list_for_each_entry(lent, &vt->lent, link) {
		if (lent->rpc == rpc) {
			vtee_lent_return(vt, lent);
			return;
		}
	}
}

/* The call has ended. */
void vtee_lent_back(struct vtee *vt, u64 call)
{
	struct vtee_lent *lent, *next;

	list_for_each_entry_safe(lent, next, &vt->lent, link)
		if (lent->call == call)
			vtee_lent_return(vt, lent);
}

/* The supplicant has given up the memory. */
void vtee_lent_unregistered(struct vtee *vt, struct vtee_region *region)
{
	struct vtee_lent *lent, *next;

	region->shm_id = -1;
	list_for_each_entry_safe(lent, next, &vt->lent, link)
		if (lent->region == region && !vtee_lent_is_held(lent))
			vtee_lent_end(lent);
}

/* The epoch has ended, and with it the TEE's claim to anything. */
void vtee_lent_forget(struct vtee *vt)
{
	struct vtee_lent *lent, *next;

	list_for_each_entry_safe(lent, next, &vt->lent, link)
		vtee_lent_return(vt, lent);
}
