// SPDX-License-Identifier: GPL-2.0-only
/*
 * Shared memory. A region is what the device knows of a tee_shm. Its pages are the driver's as
 * well, so that they stay when the client has gone and the device has not let go of them yet.
 */
#include <linux/dma-mapping.h>
#include <linux/mm.h>
#include <linux/slab.h>

#include "virtio_tee.h"

static void vtee_region_free(struct kref *ref)
{
	struct vtee_region *region = container_of(ref, struct vtee_region, ref);

	vtee_ctx_put(region->ctx);
	kfree(region);
}

/* The device does not use the memory any more, or never knew of it. */
static void vtee_region_release(struct vtee_region *region)
{
	struct vtee *vt = region->ctx->vt;
	struct sg_page_iter iter;

	/* What the device wrote was synchronized when it said so; what was written since stays. */
	if (region->mapped)
		dma_unmap_sgtable(vt->vdev->dev.parent, &region->sgt, DMA_BIDIRECTIONAL,
				  DMA_ATTR_SKIP_CPU_SYNC);
	if (region->holds_pages)
		for_each_sgtable_page(&region->sgt, &iter, 0)
			put_page(sg_page_iter_page(&iter));
	sg_free_table(&region->sgt);
	complete_all(&region->gone);
	kref_put(&region->ref, vtee_region_free);
}

/*
 * For where the device and this CPU do not see the same memory (bounce buffers, caches). Only what
 * is asked for is copied: others may be using the rest.
 */
static void vtee_region_sync(struct vtee_region *region, size_t offset, size_t size,
			     void (*sync)(struct device *dev, dma_addr_t address, size_t size,
					  enum dma_data_direction direction))
{
	struct device *dev = region->ctx->vt->vdev->dev.parent;
	struct scatterlist *sg;
	unsigned int i;
	size_t part;

	if (!region->mapped)
		return;
	for_each_sgtable_dma_sg(&region->sgt, sg, i) {
		if (!size)
			return;
		if (offset >= sg_dma_len(sg)) {
			offset -= sg_dma_len(sg);
			continue;
		}
		part = min_t(size_t, size, sg_dma_len(sg) - offset);
		sync(dev, sg_dma_address(sg) + offset, part, DMA_BIDIRECTIONAL);
		size -= part;
		offset = 0;
	}
}

/* This CPU has written, and the device is to read. */
void vtee_region_sync_device(struct vtee_region *region, size_t offset, size_t size)
{
	vtee_region_sync(region, offset, size, dma_sync_single_for_device);
}

/* The device has written, and this CPU is to read. */
void vtee_region_sync_cpu(struct vtee_region *region, size_t offset, size_t size)
{
	vtee_region_sync(region, offset, size, dma_sync_single_for_cpu);
}

/* -- when the device has let go of a region by other means than UNREGISTER_MEMORY */

static bool vtee_region_is_free(struct vtee *vt, struct vtee_region *region)
{
	if (region->ctx->closed || !READ_ONCE(vt->running))
		return true;
	return region->epoch != READ_ONCE(vt->epoch) && !vtee_epoch_in_flight(vt, region->epoch);
}

static void vtee_park(struct vtee *vt, struct vtee_region *region)
{
	spin_lock(&vt->parked_lock);
	list_add_tail(&region->parked, &vt->parked);
	spin_unlock(&vt->parked_lock);
	queue_work(vt->wq, &vt->finish_work);
}

void vtee_parked_look(struct vtee *vt)
{
	struct vtee_region *region, *next;
	LIST_HEAD(free);

	spin_lock(&vt->parked_lock);
	list_for_each_entry_safe(region, next, &vt->parked, parked)
		if (vtee_region_is_free(vt, region))
			list_move_tail(&region->parked, &free);
	spin_unlock(&vt->parked_lock);
	list_for_each_entry_safe(region, next, &free, parked)
		vtee_region_release(region);
}

/* -- ending a registration */

static void vtee_unregistered(struct vtee_req *req)
{
	struct vtee_region *region = req->data;
	struct vtee_answer answer;

	if (!vtee_req_answer(req, &answer) &&
	    (answer.status == VTEE_STATUS_OK || answer.status == VTEE_STATUS_NO_REGION))
		vtee_region_release(region);
	else
		vtee_park(req->vt, region);
}

/* Nobody uses the region any more. */
static void vtee_region_end(struct vtee_region *region)
{
	struct vtee *vt = region->ctx->vt;
	struct vtee_unregister_memory *body;
	struct vtee_req *req = NULL;
	bool closing;

	xa_lock(&vt->regions);
	if (xa_load(&vt->regions, region->id) == region)
		__xa_erase(&vt->regions, region->id);
	xa_unlock(&vt->regions);
	spin_lock(&vt->parked_lock);
	closing = region->ctx->closing;
	spin_unlock(&vt->parked_lock);
	/* Without memory for the request, the region ends with its context. */
	if (!closing)
		req = vtee_req_alloc(vt, region->ctx, VTEE_REQUEST_UNREGISTER_MEMORY, sizeof(*body),
				     0, 0);
	if (!req) {
		vtee_park(vt, region);
		return;
	}
	/* The context may have been opened anew since. */
	req->epoch = region->epoch;
	body = vtee_req_body(req);
	body->region = cpu_to_le32(region->id);
	req->data = region;
	if (vtee_req_post(req, vtee_unregistered))
		vtee_park(vt, region);
}

void vtee_region_use(struct vtee_region *region)
{
	refcount_inc(&region->users);
}

void vtee_region_unuse(struct vtee_region *region)
{
	if (refcount_dec_and_test(&region->users))
		vtee_region_end(region);
}

/* The region with this id, in use from now on; NULL if there is none. */
struct vtee_region *vtee_region_find(struct vtee *vt, u64 id)
{
	struct vtee_region *region = NULL;

	if (id > U32_MAX)
		return NULL;
	xa_lock(&vt->regions);
	region = xa_load(&vt->regions, id);
	if (region && !refcount_inc_not_zero(&region->users))
		region = NULL;
	xa_unlock(&vt->regions);
	return region;
}

/* Ids of other epochs than @epoch mean nothing any more. */
void vtee_regions_forget(struct vtee *vt, u64 epoch)
{
	struct vtee_region *region;
	unsigned long id;

	xa_lock(&vt->regions);
	xa_for_each(&vt->regions, id, region)
		if (region->epoch != epoch)
			__xa_erase(&vt->regions, id);
	xa_unlock(&vt->regions);
}

/* -- registering */

/* The tee_shm owns one use of the region, so the pointer is good as long as the tee_shm is. */
struct vtee_region *vtee_region_of(struct tee_shm *shm)
{
	return (struct vtee_region *)(uintptr_t)shm->sec_world_id;
}

/* A response to REGISTER_MEMORY: has the region an id now? */
static int vtee_region_opened(struct vtee_req *req, const struct vtee_answer *answer,
			      struct vtee_region *region)
{
	const struct vtee_register_response *body = answer->body;
	void *old;

	switch (answer->status) {
	case VTEE_STATUS_OK:
		break;
	case VTEE_STATUS_STALE_EPOCH:
	case VTEE_STATUS_ABANDONED:
		return -ESTALE;
	case VTEE_STATUS_LIMIT:
		return -ENOSPC;
	default:
		return -EIO;
	}
	region->id = le32_to_cpu(body->region);
	if (!region->id != !!answer->ret) {
		vtee_break(req->vt, "it gave a wrong id to a region");
		return -EPROTO;
	}
	if (!region->id)
		return answer->ret == TEEC_ERROR_OUT_OF_MEMORY ? -ENOMEM : -EIO;
	old = xa_store(&req->vt->regions, region->id, region, GFP_KERNEL);
	if (xa_is_err(old))
		return xa_err(old);
	if (old && ((struct vtee_region *)old)->epoch == region->epoch) {
		vtee_break(req->vt, "it gave the id of a region twice");
		return -EPROTO;
	}
	return 0;
}

/* What becomes of a region that is not the client's in the end. */
static void vtee_region_refused(struct vtee_req *req, struct vtee_region *region, int rc)
{
	if (region->id)
		vtee_region_unuse(region);
	else if (req->state == VTEE_NEW || rc == -EIO || rc == -ENOSPC || rc == -ENOMEM)
		vtee_region_release(region);
	else /* the device may have taken it, and lost its state since */
		vtee_park(req->vt, region);
}

/* The client was killed before the device had answered. */
static void vtee_register_orphaned(struct vtee_req *req)
{
	struct vtee_region *region = req->data;
	struct vtee_answer answer;
	int rc;

	rc = vtee_req_answer(req, &answer);
	if (!rc)
		rc = vtee_region_opened(req, &answer, region);
	vtee_region_refused(req, region, rc);
}

/*
 * The ranges, in as many pieces as their number takes. Returns -E2BIG beyond the device's limits.
 */
static int vtee_register_ranges(struct vtee_req *req, struct vtee_region *region)
{
	const unsigned int per_chunk = VTEE_CHUNK / sizeof(struct vtee_memory_range);
	struct vtee *vt = req->vt;
	unsigned int count = region->mapped ? region->sgt.nents : region->sgt.orig_nents;
	struct vtee_register_memory *body = vtee_req_body(req);
	struct vtee_memory_range *range;
	struct scatterlist *sg = region->sgt.sgl;
	unsigned int i;

	if (count > vt->max_region_ranges || count > VTEE_MAX_CHUNKS * per_chunk ||
	    count * sizeof(*range) + req->out_len > vt->max_request_bytes)
		return -E2BIG;
	body->num_ranges = cpu_to_le32(count);
	body->size = cpu_to_le64(region->size);
	for (i = 0; i < count; i++, sg = sg_next(sg)) {
		if (i % per_chunk == 0) {
			size_t len = min(count - i, per_chunk) * sizeof(*range);

			range = kmalloc(len, GFP_KERNEL);
			if (!range)
				return -ENOMEM;
			req->chunk[req->num_chunks] = range;
			req->chunk_len[req->num_chunks++] = len;
		}
		range->address = cpu_to_le64(region->mapped ? sg_dma_address(sg) : sg_phys(sg));
		range->length = cpu_to_le64(region->mapped ? sg_dma_len(sg) : sg->length);
		range++;
	}
	if (req->num_chunks + 2 > vt->ring_size)
		return -E2BIG;
	return 0;
}

static struct vtee_region *vtee_region_alloc(struct vtee_ctx *ctx, struct tee_shm *shm,
					     struct page **pages, size_t num_pages)
{
	struct vtee *vt = ctx->vt;
	struct vtee_region *region;
	unsigned int most = UINT_MAX;
	size_t i;

	region = kzalloc(sizeof(*region), GFP_KERNEL);
	if (!region)
		return NULL;
	kref_init(&region->ref);
	refcount_set(&region->users, 1);
	init_completion(&region->gone);
	INIT_LIST_HEAD(&region->parked);
	region->size = shm->size;
	region->epoch = ctx->epoch;
	region->shm_id = -1;
	/*
	 * Exactly the bytes that the client shares, and not those beside them in the same pages;
	 * in pieces that bounce buffers take.
	 */
	if (vtee_dma(vt))
		most = min_t(size_t, dma_max_mapping_size(vt->vdev->dev.parent), most);
	if (sg_alloc_table_from_pages_segment(&region->sgt, pages, num_pages, shm->offset,
					      shm->size, most, GFP_KERNEL))
		goto err_free;
	if (vtee_dma(vt)) {
		if (dma_map_sgtable(vt->vdev->dev.parent, &region->sgt, DMA_BIDIRECTIONAL, 0))
			goto err_table;
		region->mapped = true;
	}
	/*
	 * Memory of the kernel's own clients may be a part of a slab, whose pages cannot be held.
	 */
	region->holds_pages = shm->flags & (TEE_SHM_USER_MAPPED | TEE_SHM_POOL);
	if (region->holds_pages)
		for (i = 0; i < num_pages; i++)
			get_page(pages[i]);
	kref_get(&ctx->ref);
	region->ctx = ctx;
	return region;

err_table:
	sg_free_table(&region->sgt);
err_free:
	kfree(region);
	return NULL;
}

int vtee_shm_register(struct tee_context *tctx, struct tee_shm *shm, struct page **pages,
		      size_t num_pages, unsigned long start)
{
	struct vtee_ctx *ctx = tctx->data;
	struct vtee *vt = ctx->vt;
	struct vtee_answer answer;
	struct vtee_region *region;
	struct vtee_req *req;
	int rc;

	shm->sec_world_id = 0;
	if (!shm->size)
		return -EINVAL;
	rc = vtee_ctx_revive(ctx);
	if (rc)
		return rc;
	region = vtee_region_alloc(ctx, shm, pages, num_pages);
	if (!region)
		return -ENOMEM;
	req = vtee_req_alloc(vt, ctx, VTEE_REQUEST_REGISTER_MEMORY,
			     sizeof(struct vtee_register_memory), 0,
			     sizeof(struct vtee_register_response));
	if (!req) {
		vtee_region_release(region);
		return -ENOMEM;
	}
	region->epoch = req->epoch;
	rc = vtee_register_ranges(req, region);
	if (rc) {
		vtee_req_put(req);
		vtee_region_release(region);
		return rc;
	}
	req->data = region;
	req->finish = vtee_register_orphaned;
	rc = vtee_req_call(req, &answer);
	if (!rc)
		rc = vtee_region_opened(req, &answer, region);
	if (!rc)
		shm->sec_world_id = (uintptr_t)region;
	else if (!READ_ONCE(req->orphan))
		vtee_region_refused(req, region, rc);
	/* An orphan is still with the device: vtee_register_orphaned() sees to its region. */
	vtee_req_put(req);
	return rc;
}

int vtee_shm_unregister(struct tee_context *tctx, struct tee_shm *shm)
{
	struct vtee_region *region = vtee_region_of(shm);
	struct vtee *vt;
	bool last;

	if (!region)
		return 0;
	vt = region->ctx->vt;
	shm->sec_world_id = 0;
	mutex_lock(&vt->rpc_lock);
	vtee_lent_unregistered(vt, region);
	mutex_unlock(&vt->rpc_lock);
	kref_get(&region->ref);
	last = refcount_dec_and_test(&region->users);
	if (last)
		vtee_region_end(region);
	if (!region->holds_pages)
		wait_for_completion(&region->gone);
	else if (last)
		vtee_wait_bounded(vt, &region->gone, VTEE_CLOSE_TIMEOUT);
	kref_put(&region->ref, vtee_region_free);
	return 0;
}

/* -- memory that the TEE core asks for */

static int vtee_pool_alloc(struct tee_shm_pool *pool, struct tee_shm *shm, size_t size,
			   size_t align)
{
	size_t i, count = size / PAGE_SIZE + !!(size % PAGE_SIZE);
	struct page **pages;
	int rc = -ENOMEM;

	if (!count || size > SIZE_MAX - PAGE_SIZE)
		return -EINVAL;
	/* In one piece: that is how the TEE core maps it into a client. */
	shm->kaddr = alloc_pages_exact(count * PAGE_SIZE, GFP_KERNEL | __GFP_ZERO | __GFP_NOWARN);
	if (!shm->kaddr)
		return -ENOMEM;
	shm->paddr = virt_to_phys(shm->kaddr);
	shm->size = count * PAGE_SIZE;
	pages = kcalloc(count, sizeof(*pages), GFP_KERNEL);
	if (!pages)
		goto err_memory;
	for (i = 0; i < count; i++)
		pages[i] = virt_to_page(shm->kaddr + i * PAGE_SIZE);
	rc = vtee_shm_register(shm->ctx, shm, pages, count, (unsigned long)shm->kaddr);
	kfree(pages);
	if (rc)
		goto err_memory;
	return 0;

err_memory:
	/* The region, if it still is with the device, holds the pages itself. */
	free_pages_exact(shm->kaddr, shm->size);
	shm->kaddr = NULL;
	return rc;
}

static void vtee_pool_free(struct tee_shm_pool *pool, struct tee_shm *shm)
{
	vtee_shm_unregister(shm->ctx, shm);
	free_pages_exact(shm->kaddr, shm->size);
	shm->kaddr = NULL;
}

static void vtee_pool_destroy(struct tee_shm_pool *pool)
{
}

const struct tee_shm_pool_ops vtee_pool_ops = {
	.alloc = vtee_pool_alloc,
	.free = vtee_pool_free,
	.destroy_pool = vtee_pool_destroy,
};
