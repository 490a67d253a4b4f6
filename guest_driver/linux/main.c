// SPDX-License-Identifier: GPL-2.0-only
/*
 * virtio_tee: a TEE device for the kernel's TEE subsystem, on a virtio TEE device (ID 46). The
 * device is not trusted: what it says is checked, and one that breaks the rules is reset and not
 * used any more.
 */
#include <linux/module.h>
#include <linux/slab.h>

#include "virtio_tee.h"

/* -- the device's other lives */

/* Has the device lost its state? Then all that was opened is gone. */
void vtee_check_epoch(struct vtee *vt)
{
	u64 epoch;

	mutex_lock(&vt->epoch_lock);
	epoch = vtee_read_epoch(vt);
	if (epoch && epoch != vt->epoch && !READ_ONCE(vt->dead)) {
		dev_warn(&vt->vdev->dev, "the device has lost its state; sessions are gone\n");
		vtee_abandon_epoch(vt, epoch);
		vtee_regions_forget(vt, epoch);
		mutex_lock(&vt->rpc_lock);
		vtee_rpcs_forget(vt);
		mutex_unlock(&vt->rpc_lock);
		vtee_parked_look(vt);
	}
	mutex_unlock(&vt->epoch_lock);
}

static void vtee_epoch_work(struct work_struct *work)
{
	vtee_check_epoch(container_of(work, struct vtee, epoch_work));
}

static void vtee_config_changed(struct virtio_device *vdev)
{
	struct vtee *vt = vdev->priv;

	queue_work(vt->wq, &vt->epoch_work);
}

/* -- starting and stopping */

static int vtee_start(struct vtee *vt)
{
	int rc;

	rc = vtee_find_queues(vt);
	if (rc)
		return rc;
	rc = vtee_post_events(vt);
	if (rc)
		goto err;
	virtio_device_ready(vt->vdev);
	virtqueue_kick(vt->event);
	/* Not before: the device may have learnt of a reset only now. */
	vt->epoch = vtee_read_epoch(vt);
	WRITE_ONCE(vt->silent, false);
	WRITE_ONCE(vt->running, true);
	WRITE_ONCE(vt->dead, false);
	return 0;

err:
	virtio_reset_device(vt->vdev);
	vtee_free_events(vt);
	vt->vdev->config->del_vqs(vt->vdev);
	return rc;
}

/* The device is reset, and all that it had is ours again. */
static void vtee_stop(struct vtee *vt)
{
	mutex_lock(&vt->life_lock);
	if (!vt->running)
		goto out;
	spin_lock_irq(&vt->lock);
	vt->dead = true;
	spin_unlock_irq(&vt->lock);
	wake_up_all(&vt->supp.wait);
	virtio_reset_device(vt->vdev);
	cancel_work_sync(&vt->event_work);
	vtee_free_events(vt);
	vtee_detach_all(vt);
	vt->vdev->config->del_vqs(vt->vdev);
	WRITE_ONCE(vt->running, false);
	vtee_fail_all(vt);
	cancel_work_sync(&vt->epoch_work);
	vtee_regions_forget(vt, 0);
	mutex_lock(&vt->rpc_lock);
	vtee_rpcs_forget(vt);
	mutex_unlock(&vt->rpc_lock);
	cancel_delayed_work_sync(&vt->timer);
	queue_work(vt->wq, &vt->finish_work);
	flush_work(&vt->finish_work);
out:
	mutex_unlock(&vt->life_lock);
}

static void vtee_break_work(struct work_struct *work)
{
	vtee_stop(container_of(work, struct vtee, break_work));
}

/* The device broke the rules. May be called in any context. */
void vtee_break(struct vtee *vt, const char *why)
{
	unsigned long flags;
	bool was;

	spin_lock_irqsave(&vt->lock, flags);
	was = vt->dead;
	vt->dead = true;
	spin_unlock_irqrestore(&vt->lock, flags);
	if (was)
		return;
	dev_err(&vt->vdev->dev, "the device is not used any more: %s\n", why);
	schedule_work(&vt->break_work);
}

/* -- the driver */

static const struct tee_desc vtee_desc = {
	.name = "virtio-tee-clnt",
	.ops = &vtee_ops,
	.owner = THIS_MODULE,
};

static const struct tee_desc vtee_supp_desc = {
	.name = "virtio-tee-supp",
	.ops = &vtee_supp_ops,
	.owner = THIS_MODULE,
	.flags = TEE_DESC_PRIVILEGED,
};

static struct vtee *vtee_alloc(struct virtio_device *vdev)
{
	struct vtee *vt;

	vt = kzalloc(sizeof(*vt), GFP_KERNEL);
	if (!vt)
		return NULL;
	vt->vdev = vdev;
	vt->dead = true;
	vt->next_tag = 1;
	vt->pool.ops = &vtee_pool_ops;
	spin_lock_init(&vt->lock);
	spin_lock_init(&vt->parked_lock);
	mutex_init(&vt->life_lock);
	mutex_init(&vt->epoch_lock);
	mutex_init(&vt->rpc_lock);
	INIT_LIST_HEAD(&vt->waiting_controls);
	INIT_LIST_HEAD(&vt->waiting_others);
	INIT_LIST_HEAD(&vt->waiting_calls);
	INIT_LIST_HEAD(&vt->finished);
	INIT_LIST_HEAD(&vt->parked);
	INIT_LIST_HEAD(&vt->timed);
	INIT_LIST_HEAD(&vt->lent);
	hash_init(vt->in_flight);
	xa_init(&vt->regions);
	xa_init(&vt->rpcs);
	vtee_supp_init(&vt->supp);
	INIT_WORK(&vt->finish_work, vtee_finish_work);
	INIT_WORK(&vt->event_work, vtee_event_work);
	INIT_WORK(&vt->epoch_work, vtee_epoch_work);
	INIT_WORK(&vt->break_work, vtee_break_work);
	INIT_DELAYED_WORK(&vt->timer, vtee_rpc_timer);
	vt->wq = alloc_workqueue("virtio_tee", WQ_UNBOUND | WQ_MEM_RECLAIM, 0);
	if (!vt->wq) {
		kfree(vt);
		return NULL;
	}
	return vt;
}

static void vtee_free(struct vtee *vt)
{
	destroy_workqueue(vt->wq);
	idr_destroy(&vt->supp.requests);
	xa_destroy(&vt->supp.stand_ins);
	xa_destroy(&vt->rpcs);
	xa_destroy(&vt->regions);
	kfree(vt->event_copy);
	kfree(vt);
}

static int vtee_register_devices(struct vtee *vt)
{
	struct tee_device *teedev;
	int rc;

	teedev = tee_device_alloc(&vtee_desc, &vt->vdev->dev, &vt->pool, vt);
	if (IS_ERR(teedev))
		return PTR_ERR(teedev);
	vt->teedev = teedev;
	teedev = tee_device_alloc(&vtee_supp_desc, &vt->vdev->dev, &vt->pool, vt);
	if (IS_ERR(teedev))
		return PTR_ERR(teedev);
	vt->supp_teedev = teedev;
	rc = tee_device_register(vt->teedev);
	if (rc)
		return rc;
	return tee_device_register(vt->supp_teedev);
}

static int vtee_probe(struct virtio_device *vdev)
{
	struct vtee *vt;
	int rc;

	vt = vtee_alloc(vdev);
	if (!vt)
		return -ENOMEM;
	vdev->priv = vt;
	rc = vtee_read_config(vt);
	if (rc)
		goto err_free;
	vt->event_copy = kmalloc(vt->event_size, GFP_KERNEL);
	if (!vt->event_copy) {
		rc = -ENOMEM;
		goto err_free;
	}
	rc = vtee_start(vt);
	if (rc)
		goto err_free;
	rc = vtee_register_devices(vt);
	if (rc)
		goto err_stop;
	return 0;

err_stop:
	vtee_stop(vt);
	tee_device_unregister(vt->supp_teedev);
	tee_device_unregister(vt->teedev);
err_free:
	cancel_work_sync(&vt->break_work);
	vtee_free(vt);
	return rc;
}

/* Calls end at once. The TEE core then waits until everybody has closed the device. */
static void vtee_remove(struct virtio_device *vdev)
{
	struct vtee *vt = vdev->priv;

	vtee_stop(vt);
	tee_device_unregister(vt->supp_teedev);
	tee_device_unregister(vt->teedev);
	cancel_work_sync(&vt->break_work);
	vtee_free(vt);
}

#ifdef CONFIG_PM_SLEEP
/*
 * The device forgets everything: clients have to open their contexts anew, as after any loss of
 * state.
 */
static int vtee_freeze(struct virtio_device *vdev)
{
	vtee_stop(vdev->priv);
	return 0;
}

static int vtee_restore(struct virtio_device *vdev)
{
	return vtee_start(vdev->priv);
}
#endif

static const struct virtio_device_id vtee_ids[] = {
	{ VTEE_DEVICE_ID, VIRTIO_DEV_ANY_ID },
	{ 0 },
};
MODULE_DEVICE_TABLE(virtio, vtee_ids);

static const unsigned int vtee_features[] = {
	VTEE_FEATURE_RPC,
	VTEE_FEATURE_NOTIFICATION,
};

static struct virtio_driver vtee_driver = {
	.driver.name = KBUILD_MODNAME,
	.id_table = vtee_ids,
	.feature_table = vtee_features,
	.feature_table_size = ARRAY_SIZE(vtee_features),
	.probe = vtee_probe,
	.remove = vtee_remove,
	.config_changed = vtee_config_changed,
#ifdef CONFIG_PM_SLEEP
	.freeze = vtee_freeze,
	.restore = vtee_restore,
#endif
};
module_virtio_driver(vtee_driver);

MODULE_DESCRIPTION("virtio TEE device driver");
MODULE_LICENSE("GPL");
