// SPDX-License-Identifier: GPL-2.0-only
/*
 * For tests of the kernel driver, in the kernel: `what=client` is a client of the TEE core;
 * `what=suspend` has the device suspended and resumed, as the system's sleep would. What came of it
 * is read from the parameter `result`.
 */
#include <linux/module.h>
#include <linux/slab.h>
#include <linux/tee_drv.h>
#include <linux/uuid.h>
#include <linux/virtio.h>

static char what[16];
module_param_string(what, what, sizeof(what), 0400);
static char result[1024];
module_param_string(result, result, sizeof(result), 0400);

#define XOR 2
#define SIZE 9000

static const uuid_t hello =
	UUID_INIT(0x8aaaf200, 0x2450, 0x11e4, 0xab, 0xe2, 0x00, 0x02, 0xa5, 0xd5, 0xc5, 0x1b);
static const uuid_t probe =
	UUID_INIT(0x3f0c8d2e, 0x6a51, 0x4b7c, 0x9d, 0x14, 0x8e, 0x2b, 0x7a, 0x90, 0xc5, 0xf6);

__printf(1, 2) static void say(const char *format, ...)
{
	size_t at = strlen(result);
	va_list args;

	va_start(args, format);
	vsnprintf(result + at, sizeof(result) - at, format, args);
	va_end(args);
}

static int match(struct tee_ioctl_version_data *version, const void *data)
{
	return version->impl_id == TEE_IMPL_ID_OPTEE && version->gen_caps & TEE_GEN_CAP_GP;
}

static u32 open_session(struct tee_context *ctx, const uuid_t *uuid, u32 login, const char *name)
{
	struct tee_ioctl_open_session_arg arg = { .clnt_login = login };
	int rc;

	export_uuid(arg.uuid, uuid);
	rc = tee_client_open_session(ctx, &arg, NULL);
	say("%s %d %#x;", name, rc, arg.ret);
	return arg.session;
}

static int invoke(struct tee_context *ctx, u32 session, u32 func, struct tee_param *params,
		  u32 count, u32 *ret)
{
	struct tee_ioctl_invoke_arg arg = { .func = func, .session = session, .num_params = count };
	int rc;

	rc = tee_client_invoke_func(ctx, &arg, params);
	*ret = arg.ret;
	return rc;
}

static void try_memory(struct tee_context *ctx, u32 session, struct tee_shm *shm, u8 *data,
		       const char *name)
{
	struct tee_param params[2] = {
		{ .attr = TEE_IOCTL_PARAM_ATTR_TYPE_MEMREF_INOUT },
		{ .attr = TEE_IOCTL_PARAM_ATTR_TYPE_VALUE_INPUT, .u.value.a = 0xff },
	};
	size_t i, wrong = 0;
	u32 ret;
	int rc;

	if (IS_ERR(shm)) {
		say("%s %ld;", name, PTR_ERR(shm));
		return;
	}
	for (i = 0; i < SIZE; i++)
		data[i] = i;
	params[0].u.memref.shm = shm;
	params[0].u.memref.shm_offs = 10;
	params[0].u.memref.size = SIZE - 20;
	rc = invoke(ctx, session, XOR, params, 2, &ret);
	for (i = 0; i < SIZE; i++)
		wrong += data[i] != (u8)(i >= 10 && i < SIZE - 10 ? ~i : i);
	say("%s %d %#x %zu;", name, rc, ret, wrong);

	params[0].u.memref.shm_offs = shm->size;
	params[0].u.memref.size = 1;
	say("outside %d;", invoke(ctx, session, XOR, params, 2, &ret));
}

static void client(struct tee_context *ctx)
{
	struct tee_param param = { .attr = TEE_IOCTL_PARAM_ATTR_TYPE_VALUE_INOUT, .u.value.a = 41 };
	u8 *mine = kmalloc(SIZE, GFP_KERNEL);
	struct tee_shm *shm;
	u32 session, ret;
	int rc;

	if (!mine)
		return;
	session = open_session(ctx, &hello, TEE_IOCTL_LOGIN_PUBLIC, "hello");
	rc = invoke(ctx, session, 0, &param, 1, &ret);
	say("add %d %#x %llu;", rc, ret, param.u.value.a);
	say("close %d;", tee_client_close_session(ctx, session));
	open_session(ctx, &hello, TEE_IOCTL_LOGIN_REE_KERNEL, "kernel");
	session = open_session(ctx, &probe, TEE_IOCTL_LOGIN_PUBLIC, "probe");
	shm = tee_shm_alloc_kernel_buf(ctx, SIZE);
	try_memory(ctx, session, shm, IS_ERR(shm) ? NULL : tee_shm_get_va(shm, 0), "allocated");
	if (!IS_ERR(shm))
		tee_shm_free(shm);
	shm = tee_shm_register_kernel_buf(ctx, mine, SIZE);
	try_memory(ctx, session, shm, mine, "registered");
	if (!IS_ERR(shm))
		tee_shm_free(shm);
	kfree(mine);
}

static int is_tee(struct device *dev, const void *data)
{
	return dev->driver && !strcmp(dev->driver->name, "virtio_tee");
}

/* A driver of nothing: it is told which bus virtio's is. */
static const struct virtio_device_id no_ids[] = { { 0 } };
static struct virtio_driver nobody = { .driver.name = "vtee_test", .id_table = no_ids };

static void suspend(void)
{
	struct device *dev;

	if (register_virtio_driver(&nobody))
		return;
	dev = bus_find_device(nobody.driver.bus, NULL, NULL, is_tee);
	if (dev) {
		say("freeze %d;", virtio_device_freeze(dev_to_virtio(dev)));
		say("restore %d;", virtio_device_restore(dev_to_virtio(dev)));
		put_device(dev);
	}
	unregister_virtio_driver(&nobody);
}

static int __init vtee_test_init(void)
{
	struct tee_context *ctx = tee_client_open_context(NULL, match, NULL, NULL);

	if (IS_ERR(ctx))
		return PTR_ERR(ctx);
	if (!strcmp(what, "suspend"))
		suspend();
	else
		client(ctx);
	tee_client_close_context(ctx);
	return 0;
}

static void __exit vtee_test_exit(void)
{
}

module_init(vtee_test_init);
module_exit(vtee_test_exit);
MODULE_DESCRIPTION("Tests of virtio_tee in the kernel");
MODULE_LICENSE("GPL");
