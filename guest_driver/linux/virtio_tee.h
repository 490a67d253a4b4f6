/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef VIRTIO_TEE_H
#define VIRTIO_TEE_H

#include <linux/completion.h>
#include <linux/hashtable.h>
#include <linux/idr.h>
#include <linux/kref.h>
#include <linux/mutex.h>
#include <linux/refcount.h>
#include <linux/scatterlist.h>
#include <linux/virtio.h>
#include <linux/wait.h>
#include <linux/workqueue.h>
#include <linux/xarray.h>

#include "compat.h"
#include "wire.h"

/* GlobalPlatform's result codes and origins, as far as the driver gives them itself. */
#define TEEC_SUCCESS 0x00000000
#define TEEC_ERROR_CANCEL 0xffff0002
#define TEEC_ERROR_BAD_PARAMETERS 0xffff0006
#define TEEC_ERROR_ITEM_NOT_FOUND 0xffff0008
#define TEEC_ERROR_NOT_SUPPORTED 0xffff000a
#define TEEC_ERROR_OUT_OF_MEMORY 0xffff000c
#define TEEC_ERROR_COMMUNICATION 0xffff000e
#define TEEC_ERROR_SHORT_BUFFER 0xffff0010
#define TEE_ERROR_TIMEOUT 0xffff3001
#define TEEC_ERROR_TARGET_DEAD 0xffff3024
#define TEEC_ORIGIN_API 1
#define TEEC_ORIGIN_COMMS 2

#define VTEE_MAX_PARAMS 128 /* of one request or RPC, whatever the device allows */
#define VTEE_MAX_EVENT_SIZE SZ_64K
#define VTEE_MAX_RPCS 1024
#define VTEE_MAX_NOTIFICATIONS 256 /* values below this can be waited for */
#define VTEE_MAX_REQUEST_QUEUES 8
#define VTEE_RESERVE 16 /* descriptors that calls leave to other requests */
#define VTEE_CHUNK SZ_32K /* a longer tail of a request is sent in pieces */
#define VTEE_MAX_CHUNKS 16
#define VTEE_CLOSE_TIMEOUT (5 * HZ)

struct vtee_supp {
	/* the rest is guarded by rpc_lock */
	struct tee_context *ctx; /* the supplicant's, or NULL */
	struct list_head queued;
	struct idr requests;
	int in_hand; /* of a supplicant that does one at a time, or -1 */
	struct xarray stand_ins; /* for the TEE core, by shm id */
	wait_queue_head_t wait;
};

struct vtee {
	struct virtio_device *vdev;
	struct tee_device *teedev;
	struct tee_device *supp_teedev;
	struct tee_shm_pool pool;
	struct workqueue_struct *wq;

	/* of the config space; they do not change */
	struct tee_ioctl_version_data version;
	u32 max_params;
	u32 max_calls;
	u32 max_rpcs;
	u32 max_region_ranges;
	u32 max_request_bytes;
	u32 num_event_buffers;
	u32 event_size;
	u32 config_queues;

	struct virtqueue *control;
	struct virtqueue *event;
	struct virtqueue *request[VTEE_MAX_REQUEST_QUEUES];
	unsigned int num_request;
	unsigned int ring_size; /* of the smallest one */

	spinlock_t lock; /* control and request queues, and what follows */
	u64 epoch;
	u64 next_tag;
	bool dead; /* nothing is sent any more */
	unsigned int calls; /* that the device has */
	unsigned int owed; /* answers to RPCs that the device has not returned */
	unsigned int next_queue;
	bool silent; /* it was waited for in vain, and has returned nothing since */
	struct list_head waiting_controls;
	struct list_head waiting_others;
	struct list_head waiting_calls;
	struct list_head finished; /* requests for which nobody waits */
	DECLARE_HASHTABLE(in_flight, 8);

	struct work_struct finish_work;
	struct work_struct event_work;
	struct work_struct epoch_work;
	struct work_struct break_work;
	struct mutex life_lock; /* stopping the device */
	struct mutex epoch_lock; /* looking for a new epoch */
	bool running;

	struct xarray regions; /* by id */
	spinlock_t parked_lock;
	struct list_head parked; /* regions that the device may still use */

	void *event_copy;

	struct mutex rpc_lock; /* all that follows */
	struct xarray rpcs; /* by id */
	unsigned int num_rpcs;
	struct list_head timed; /* RPCs that the driver answers at some time */
	struct delayed_work timer;
	struct list_head lent;
	DECLARE_BITMAP(notified, VTEE_MAX_NOTIFICATIONS);
	struct vtee_supp supp;
};

/* A context of the device: one open file, or one client in the kernel. */
struct vtee_ctx {
	struct kref ref;
	struct vtee *vt;
	u32 id;
	u64 epoch;
	bool closing; /* guarded by parked_lock */
	bool closed; /* likewise */
	bool privileged;
	atomic_t requests; /* in flight */
	struct mutex open_lock; /* the supplicant's context is opened again after a loss of state */
};

/* A registration with the device. Its pages stay until the device has let go of them. */
struct vtee_region {
	struct kref ref;
	refcount_t users; /* the tee_shm, calls, RPCs: unregistered when the last has gone */
	struct vtee_ctx *ctx;
	u64 epoch;
	u32 id;
	int shm_id;
	size_t size;
	struct sg_table sgt;
	bool holds_pages;
	bool mapped;
	struct list_head parked;
	struct completion gone;
};

/* What a call uses of a region. */
struct vtee_span {
	struct vtee_region *region;
	size_t offset;
	size_t size;
	bool written; /* by the device */
};

/* What the device was asked for, until it is returned. */
struct vtee_req {
	struct kref ref;
	struct vtee *vt;
	struct vtee_ctx *ctx;
	struct hlist_node hash;
	struct list_head link;
	struct completion done;
	/*
	 * In process context, once the device has returned it (or is gone), if nobody waits for it
	 * any more.
	 */
	void (*finish)(struct vtee_req *req);
	void *data;
	u64 tag;
	u64 epoch;
	u32 type;
	u32 session;
	u32 cancel_id;
	enum { VTEE_NEW, VTEE_WAITING, VTEE_SENT, VTEE_RETURNED } state;
	bool orphan;
	bool cancelled;
	int error;
	u32 used;
	void *out;
	size_t out_len;
	void *in;
	void *answer; /* a copy of @in that the device cannot change */
	size_t in_len;
	void *chunk[VTEE_MAX_CHUNKS];
	size_t chunk_len[VTEE_MAX_CHUNKS];
	unsigned int num_chunks;
	unsigned int num_spans;
	struct vtee_span span[];
};

struct vtee_answer {
	u32 status;
	u32 ret;
	u32 origin;
	const void *body; /* NULL unless the status is OK */
};

/* What the TEE asks of the guest. */
struct vtee_rpc {
	struct list_head timed;
	unsigned long expires;
	u64 epoch;
	u64 call;
	u32 id;
	u32 command;
	u32 notification; /* that it waits for, or VTEE_MAX_NOTIFICATIONS */
	struct vtee_supp_req *supp;
	unsigned int num_params;
	struct vtee_region **region; /* one place for each parameter */
	struct vtee_param param[]; /* as in the event */
};

/* Memory of the supplicant's that answered a SHM_ALLOC. */
struct vtee_lent {
	struct list_head link;
	struct vtee_region *region;
	u64 call; /* after which the TEE does not use it any more; 0: not known */
	u32 rpc;
	u32 type;
};

/* main.c */
void vtee_break(struct vtee *vt, const char *why);
void vtee_check_epoch(struct vtee *vt);
static inline bool vtee_dma(struct vtee *vt)
{
	return !virtio_has_dma_quirk(vt->vdev);
}

/* config.c */
int vtee_read_config(struct vtee *vt);
u64 vtee_read_epoch(struct vtee *vt);

/* queue.c */
int vtee_find_queues(struct vtee *vt);
struct vtee_req *vtee_req_alloc(struct vtee *vt, struct vtee_ctx *ctx, u32 type, size_t body,
				unsigned int num_params, size_t response);
void vtee_req_put(struct vtee_req *req);
int vtee_req_send(struct vtee_req *req);
int vtee_req_post(struct vtee_req *req, void (*finish)(struct vtee_req *req));
int vtee_req_call(struct vtee_req *req, struct vtee_answer *answer);
int vtee_req_call_bounded(struct vtee_req *req, struct vtee_answer *answer, long timeout);
int vtee_req_answer(struct vtee_req *req, struct vtee_answer *answer);
int vtee_wait_bounded(struct vtee *vt, struct completion *done, long timeout);
bool vtee_req_cancel(struct vtee *vt, struct vtee_ctx *ctx, u32 session, u32 cancel_id);
void vtee_cancel_tag(struct vtee *vt, struct vtee_ctx *ctx, u64 tag);
bool vtee_epoch_in_flight(struct vtee *vt, u64 epoch);
void vtee_abandon_epoch(struct vtee *vt, u64 epoch);
void vtee_detach_all(struct vtee *vt);
void vtee_fail_all(struct vtee *vt);
void vtee_finish_work(struct work_struct *work);

static inline void *vtee_req_body(struct vtee_req *req)
{
	return req->out + sizeof(struct vtee_request_header);
}

/* call.c */
extern const struct tee_driver_ops vtee_ops;
extern const struct tee_driver_ops vtee_supp_ops;
void vtee_ctx_put(struct vtee_ctx *ctx);
int vtee_ctx_revive(struct vtee_ctx *ctx);

/* params.c */
int vtee_params_out(struct vtee_req *req, struct vtee_param *wire, const struct tee_param *params,
		    unsigned int count);
int vtee_params_in(struct vtee_req *req, const struct vtee_param *wire, struct tee_param *params,
		   unsigned int count, u32 ret);
void vtee_params_sync_cpu(struct vtee_req *req);
void vtee_params_done(struct vtee_req *req);

/* shm.c */
extern const struct tee_shm_pool_ops vtee_pool_ops;
int vtee_shm_register(struct tee_context *tctx, struct tee_shm *shm, struct page **pages,
		      size_t num_pages, unsigned long start);
int vtee_shm_unregister(struct tee_context *tctx, struct tee_shm *shm);
struct vtee_region *vtee_region_of(struct tee_shm *shm);
struct vtee_region *vtee_region_find(struct vtee *vt, u64 id);
void vtee_region_sync_device(struct vtee_region *region, size_t offset, size_t size);
void vtee_region_sync_cpu(struct vtee_region *region, size_t offset, size_t size);
void vtee_region_use(struct vtee_region *region);
void vtee_region_unuse(struct vtee_region *region);
void vtee_regions_forget(struct vtee *vt, u64 epoch);
void vtee_parked_look(struct vtee *vt);

/* event.c */
int vtee_post_events(struct vtee *vt);
void vtee_free_events(struct vtee *vt);
void vtee_event_work(struct work_struct *work);
void vtee_event_done(struct virtqueue *vq);

/* rpc.c; what is below the first three, and the timer, is called with rpc_lock held */
void vtee_rpc_event(struct vtee *vt, const void *data, size_t size);
void vtee_rpc_withdrawn(struct vtee *vt, const void *data, size_t size);
void vtee_notification(struct vtee *vt, const void *data, size_t size);
void vtee_rpc_timer(struct work_struct *work);
void vtee_rpc_answer(struct vtee *vt, struct vtee_rpc *rpc, u32 ret,
		     const struct vtee_param *params, unsigned int count);
void vtee_rpc_gone(struct vtee *vt, struct vtee_rpc *rpc);
void vtee_rpcs_forget(struct vtee *vt);

/* lent.c; all with rpc_lock held */
int vtee_lend(struct vtee *vt, struct vtee_rpc *rpc, struct vtee_region *region, u64 size);
int vtee_lent_freed(struct vtee *vt, struct vtee_region *region);
void vtee_lent_refused(struct vtee *vt, u32 rpc);
void vtee_lent_back(struct vtee *vt, u64 call);
void vtee_lent_unregistered(struct vtee *vt, struct vtee_region *region);
void vtee_lent_forget(struct vtee *vt);

/* supp.c; the system calls without rpc_lock, all else that has to do with RPCs with it */
void vtee_supp_init(struct vtee_supp *supp);
int vtee_supp_open(struct vtee *vt, struct tee_context *tctx);
void vtee_supp_release(struct vtee *vt);
int vtee_supp_recv(struct tee_context *tctx, u32 *func, u32 *num_params, struct tee_param *params);
int vtee_supp_send(struct tee_context *tctx, u32 ret, u32 num_params, struct tee_param *params);
bool vtee_supp_ask(struct vtee *vt, struct vtee_rpc *rpc);
bool vtee_supp_free(struct vtee *vt, int shm_id, u32 type, struct vtee_rpc *rpc);
void vtee_supp_forget(struct vtee *vt, struct vtee_rpc *rpc);

#endif
