// SPDX-License-Identifier: GPL-2.0-only
/*
 * The device's configuration space: is it the device that we know, and what does it say of itself.
 */
#include <linux/pci.h>
#include <linux/virtio_pci.h>

#include "virtio_tee.h"

/*
 * virtio-pci takes a read beyond the configuration space for a bug of the driver and stops the
 * kernel. Another kind of device with the same ID may have a shorter one: look before reading.
 */
static bool vtee_config_is_long_enough(struct virtio_device *vdev)
{
	struct pci_dev *pdev;
	u32 length;
	u8 type;
	int pos;

	if (!vdev->dev.parent || !dev_is_pci(vdev->dev.parent))
		return true;
	pdev = to_pci_dev(vdev->dev.parent);
	for (pos = pci_find_capability(pdev, PCI_CAP_ID_VNDR); pos;
	     pos = pci_find_next_capability(pdev, pos, PCI_CAP_ID_VNDR)) {
		pci_read_config_byte(pdev, pos + offsetof(struct virtio_pci_cap, cfg_type), &type);
		if (type != VIRTIO_PCI_CAP_DEVICE_CFG)
			continue;
		pci_read_config_dword(pdev, pos + offsetof(struct virtio_pci_cap, length), &length);
		return length >= sizeof(struct vtee_config);
	}
	return false;
}

/* Read so that the epoch is one value and not halves of two. */
u64 vtee_read_epoch(struct vtee *vt)
{
	u64 epoch;

	virtio_cread_le(vt->vdev, struct vtee_config, epoch, &epoch);
	return epoch;
}

int vtee_read_config(struct vtee *vt)
{
	struct device *dev = &vt->vdev->dev;
	struct vtee_config config;

	if (!vt->vdev->config->get || !vtee_config_is_long_enough(vt->vdev)) {
		dev_info(dev, "another kind of device with ID %u: its config space is too small\n",
			 VTEE_DEVICE_ID);
		return -ENODEV;
	}
	virtio_cread_bytes(vt->vdev, 0, &config, sizeof(config));
	if (le32_to_cpu(config.magic) != VTEE_MAGIC) {
		dev_info(dev, "another kind of device with ID %u: magic %#x\n", VTEE_DEVICE_ID,
			 le32_to_cpu(config.magic));
		return -ENODEV;
	}
	if (le16_to_cpu(config.version_major) != VTEE_VERSION_MAJOR) {
		dev_err(dev, "version %u.%u of the device is not known to this driver\n",
			le16_to_cpu(config.version_major), le16_to_cpu(config.version_minor));
		return -ENODEV;
	}
	vt->max_params = min_t(u32, le32_to_cpu(config.max_params), VTEE_MAX_PARAMS);
	vt->max_calls = le32_to_cpu(config.max_calls);
	vt->max_rpcs = min_t(u32, le32_to_cpu(config.max_rpcs), VTEE_MAX_RPCS);
	vt->max_region_ranges = le32_to_cpu(config.max_region_ranges);
	vt->max_request_bytes = le32_to_cpu(config.max_request_bytes);
	vt->num_event_buffers = le32_to_cpu(config.num_event_buffers);
	vt->event_size = le32_to_cpu(config.event_buffer_size);
	vt->config_queues = le32_to_cpu(config.num_request_queues);
	if (!config.epoch || vt->max_params < 4 || !vt->max_calls || !vt->max_region_ranges ||
	    !vt->num_event_buffers || !vt->config_queues || !le32_to_cpu(config.rpc_deadline_ms) ||
	    vt->event_size < sizeof(struct vtee_event_header) ||
	    vt->event_size > VTEE_MAX_EVENT_SIZE) {
		dev_err(dev, "the device's limits make no sense\n");
		return -EINVAL;
	}
	vt->version.impl_id = le32_to_cpu(config.tee_impl_id);
	vt->version.impl_caps = le32_to_cpu(config.tee_impl_caps);
	/* Registering memory is the driver's own capability, all else is the TEE's. */
	vt->version.gen_caps =
		(le32_to_cpu(config.tee_gen_caps) & (TEE_GEN_CAP_GP | TEE_GEN_CAP_MEMREF_NULL)) |
		TEE_GEN_CAP_REG_MEM;
	return 0;
}
