/* SPDX-License-Identifier: GPL-2.0-only */
/* What differs between the kernels that this module is built for: 6.1 and newer. */
#ifndef VIRTIO_TEE_COMPAT_H
#define VIRTIO_TEE_COMPAT_H

#include <linux/slab.h>
#include <linux/version.h>
#include <linux/virtio_config.h>

#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 1, 0)
#error "virtio_tee needs Linux 6.1 or newer"
#endif

/* The part of the TEE subsystem that is for its drivers has moved. */
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 10, 0)
#include <linux/tee_core.h>
#else
#include <linux/tee_drv.h>
#endif

#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 11, 0)
struct virtqueue_info {
	const char *name;
	vq_callback_t *callback;
};

static inline int vtee_find_vqs(struct virtio_device *vdev, unsigned int count,
				struct virtqueue *vqs[], struct virtqueue_info *info)
{
	const char **names = kcalloc(count, sizeof(*names), GFP_KERNEL);
	vq_callback_t **callbacks = kcalloc(count, sizeof(*callbacks), GFP_KERNEL);
	int rc = -ENOMEM;
	unsigned int i;

	if (names && callbacks) {
		for (i = 0; i < count; i++) {
			names[i] = info[i].name;
			callbacks[i] = info[i].callback;
		}
		rc = virtio_find_vqs(vdev, count, vqs, callbacks, names, NULL);
	}
	kfree(callbacks);
	kfree(names);
	return rc;
}
#else
static inline int vtee_find_vqs(struct virtio_device *vdev, unsigned int count,
				struct virtqueue *vqs[], struct virtqueue_info *info)
{
	return virtio_find_vqs(vdev, count, vqs, info, NULL);
}
#endif

#endif
