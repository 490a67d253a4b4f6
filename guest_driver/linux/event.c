// SPDX-License-Identifier: GPL-2.0-only
/* The event queue: buffers that the device fills. */
#include <linux/slab.h>

#include "virtio_tee.h"

#define VTEE_EVENTS_AT_ONCE 64

static int vtee_post_event(struct vtee *vt, void *buffer)
{
	struct scatterlist sg;

	sg_init_one(&sg, buffer, vt->event_size);
	return virtqueue_add_inbuf(vt->event, &sg, 1, buffer, GFP_KERNEL);
}

/* As many buffers as the device wants, or as the queue takes. */
int vtee_post_events(struct vtee *vt)
{
	u32 i, count = min(vt->num_event_buffers, virtqueue_get_vring_size(vt->event));
	void *buffer;
	int rc = 0;

	for (i = 0; i < count && !rc; i++) {
		buffer = kzalloc(vt->event_size, GFP_KERNEL);
		if (!buffer)
			return -ENOMEM;
		rc = vtee_post_event(vt, buffer);
		if (rc)
			kfree(buffer);
	}
	return rc;
}

/* The device was reset and has no buffer any more. */
void vtee_free_events(struct vtee *vt)
{
	void *buffer;

	while ((buffer = virtqueue_detach_unused_buf(vt->event)))
		kfree(buffer);
}

static void vtee_take_event(struct vtee *vt, const void *event, size_t size)
{
	const struct vtee_event_header *header = event;
	u64 epoch;
	u32 type;

	if (size < sizeof(*header)) {
		vtee_break(vt, "it sent an event that makes no sense");
		return;
	}
	type = le32_to_cpu(header->type);
	epoch = le64_to_cpu(header->epoch);
	event += sizeof(*header);
	size -= sizeof(*header);
	if (epoch != READ_ONCE(vt->epoch))
		vtee_check_epoch(vt);
	if (epoch != READ_ONCE(vt->epoch))
		return;
	switch (type) {
	case VTEE_EVENT_RPC:
		vtee_rpc_event(vt, event, size);
		break;
	case VTEE_EVENT_RPC_WITHDRAWN:
		vtee_rpc_withdrawn(vt, event, size);
		break;
	case VTEE_EVENT_NOTIFICATION:
		vtee_notification(vt, event, size);
		break;
	}
}

static bool vtee_take_events(struct vtee *vt)
{
	unsigned int i, used;
	void *buffer;

	for (i = 0; i < VTEE_EVENTS_AT_ONCE; i++) {
		buffer = virtqueue_get_buf(vt->event, &used);
		if (!buffer)
			return false;
		used = min(used, vt->event_size);
		memcpy(vt->event_copy, buffer, used);
		if (vtee_post_event(vt, buffer))
			kfree(buffer);
		virtqueue_kick(vt->event);
		if (used)
			vtee_take_event(vt, vt->event_copy, used);
	}
	return true;
}

void vtee_event_work(struct work_struct *work)
{
	struct vtee *vt = container_of(work, struct vtee, event_work);

	do {
		virtqueue_disable_cb(vt->event);
		if (vtee_take_events(vt)) {
			/* Others on this CPU want to run, too. */
			queue_work(vt->wq, &vt->event_work);
			return;
		}
		if (virtqueue_is_broken(vt->event)) {
			vtee_break(vt, "it broke the event queue");
			return;
		}
	} while (!virtqueue_enable_cb(vt->event));
}

void vtee_event_done(struct virtqueue *vq)
{
	struct vtee *vt = vq->vdev->priv;

	queue_work(vt->wq, &vt->event_work);
}
