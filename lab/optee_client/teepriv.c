/*
 * Preloaded into tee-supplicant: gives it a /dev/teepriv0 without a kernel driver.
 *
 * The device is a connected SOCK_SEQPACKET socket, inherited under the number in TEEPRIV_FD. One packet to us is one
 * struct tee_iocl_supp_recv_arg with its parameters, one packet from us a struct tee_iocl_supp_send_arg with its
 * parameters (linux/tee.h). Shared memory is files "0", "1", … in the folder TEEPRIV_SHM, named by their id.
 *
 * The ioctls behave as those of Linux's OP-TEE driver, except that memory cannot be registered (TEE_GEN_CAP_REG_MEM is
 * not offered), so that it is always allocated here.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/tee.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#define DEVICE "/dev/teepriv0"

static int channel(void)
{
	const char *number = getenv("TEEPRIV_FD");

	return number ? atoi(number) : -1;
}

static int get_version(struct tee_ioctl_version_data *data)
{
	data->impl_id = TEE_IMPL_ID_OPTEE;
	data->impl_caps = TEE_OPTEE_CAP_TZ;
	data->gen_caps = TEE_GEN_CAP_GP | TEE_GEN_CAP_PRIVILEGED | TEE_GEN_CAP_MEMREF_NULL;
	return 0;
}

static int allocate(struct tee_ioctl_shm_alloc_data *data)
{
	static atomic_int next;
	const long page = sysconf(_SC_PAGESIZE);
	const char *folder = getenv("TEEPRIV_SHM");
	char path[4096];
	int fd;

	if (data->flags || !data->size || !folder) {
		errno = EINVAL;
		return -1;
	}
	data->id = atomic_fetch_add(&next, 1);
	data->size = (data->size + page - 1) / page * page;
	if (snprintf(path, sizeof(path), "%s/%d", folder, data->id) >= (int)sizeof(path)) {
		errno = ENAMETOOLONG;
		return -1;
	}
	fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
	if (fd >= 0 && ftruncate(fd, data->size)) {
		close(fd);
		return -1;
	}
	return fd;
}

static int receive(int fd, struct tee_ioctl_buf_data *data)
{
	ssize_t size;

	do
		size = recv(fd, (void *)(uintptr_t)data->buf_ptr, data->buf_len, MSG_TRUNC);
	while (size < 0 && errno == EINTR);
	if (size < 0)
		return -1;
	if (!size || (uint64_t)size > data->buf_len) {
		errno = size ? EINVAL : ENODEV; /* too little room; or the other end is gone */
		return -1;
	}
	return 0;
}

static int answer(int fd, struct tee_ioctl_buf_data *data)
{
	ssize_t size = send(fd, (void *)(uintptr_t)data->buf_ptr, data->buf_len, MSG_NOSIGNAL);

	return size == (ssize_t)data->buf_len ? 0 : -1;
}

int ioctl(int fd, unsigned long request, ...)
{
	static int (*next)(int, unsigned long, ...);
	va_list list;
	void *data;

	va_start(list, request);
	data = va_arg(list, void *);
	va_end(list);
	if (fd == channel()) {
		switch (request) {
		case TEE_IOC_VERSION:
			return get_version(data);
		case TEE_IOC_SHM_ALLOC:
			return allocate(data);
		case TEE_IOC_SUPPL_RECV:
			return receive(fd, data);
		case TEE_IOC_SUPPL_SEND:
			return answer(fd, data);
		default:
			errno = EINVAL;
			return -1;
		}
	}
	if (!next)
		next = (int (*)(int, unsigned long, ...))dlsym(RTLD_NEXT, "ioctl");
	return next(fd, request, data);
}

static int open_device_or(const char *symbol, const char *path, int flags, mode_t mode)
{
	int (*next)(const char *, int, ...);

	if (!strcmp(path, DEVICE))
		return channel();
	next = (int (*)(const char *, int, ...))dlsym(RTLD_NEXT, symbol);
	return next(path, flags, mode);
}

#define OPEN(name)                                                         \
	int name(const char *path, int flags, ...)                         \
	{                                                                  \
		mode_t mode = 0;                                           \
		va_list list;                                              \
                                                                           \
		if (flags & (O_CREAT | __O_TMPFILE)) {                     \
			va_start(list, flags);                             \
			mode = va_arg(list, mode_t);                       \
			va_end(list);                                      \
		}                                                          \
		return open_device_or(#name, path, flags, mode);           \
	}

OPEN(open)
OPEN(open64)
