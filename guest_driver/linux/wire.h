/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What goes over the queues of a virtio TEE device: see docs/specification.md.
 * A test compares all of this with the specification's definitions.
 */
#ifndef VIRTIO_TEE_WIRE_H
#define VIRTIO_TEE_WIRE_H

#include <linux/types.h>

#define VTEE_DEVICE_ID 46
#define VTEE_MAGIC 0x45455456
#define VTEE_VERSION_MAJOR 0

enum vtee_queue {
	VTEE_QUEUE_CONTROL = 0,
	VTEE_QUEUE_EVENT = 1,
	VTEE_QUEUE_REQUEST = 2,
};

/* Feature bits, by number. */
enum vtee_feature {
	VTEE_FEATURE_INLINE = 0,
	VTEE_FEATURE_RPC = 1,
	VTEE_FEATURE_NOTIFICATION = 2,
	VTEE_FEATURE_FFA_HANDLE = 3,
	VTEE_FEATURE_OCALL = 4,
	VTEE_FEATURE_SERVICES = 5,
	VTEE_FEATURE_ATTESTATION = 6,
	VTEE_FEATURE_ENCLAVES = 7,
};

enum vtee_request {
	VTEE_REQUEST_OPEN_CONTEXT = 0x0001,
	VTEE_REQUEST_CLOSE_CONTEXT = 0x0002,
	VTEE_REQUEST_OPEN_SESSION = 0x0010,
	VTEE_REQUEST_CLOSE_SESSION = 0x0011,
	VTEE_REQUEST_INVOKE = 0x0012,
	VTEE_REQUEST_REGISTER_MEMORY = 0x0020,
	VTEE_REQUEST_UNREGISTER_MEMORY = 0x0022,
	VTEE_REQUEST_CANCEL = 0x0100,
	VTEE_REQUEST_RPC_REPLY = 0x0101,
	VTEE_REQUEST_RPC_WITHDRAWN_ACK = 0x0102,
};

enum vtee_status {
	VTEE_STATUS_OK = 0,
	VTEE_STATUS_UNSUPPORTED = 1,
	VTEE_STATUS_MALFORMED = 2,
	VTEE_STATUS_STALE_EPOCH = 3,
	VTEE_STATUS_NO_CONTEXT = 4,
	VTEE_STATUS_NO_SESSION = 5,
	VTEE_STATUS_NO_REGION = 6,
	VTEE_STATUS_BAD_RANGE = 7,
	VTEE_STATUS_LIMIT = 8,
	VTEE_STATUS_DUPLICATE_TAG = 9,
	VTEE_STATUS_NOT_FOUND = 10,
	VTEE_STATUS_ABANDONED = 11,
	VTEE_STATUS_DENIED = 12,
	VTEE_STATUS_IN_USE = 13,
};

enum vtee_event {
	VTEE_EVENT_RPC = 0x8001,
	VTEE_EVENT_RPC_WITHDRAWN = 0x8002,
	VTEE_EVENT_NOTIFICATION = 0x8003,
	VTEE_EVENT_EPOCH = 0x8004,
};

enum vtee_rpc_target {
	VTEE_TARGET_SUPPLICANT = 0,
	VTEE_TARGET_CLIENT = 1,
};

/* OP-TEE's, as far as the driver treats them by name. */
enum vtee_rpc_command {
	VTEE_RPC_LOAD_TA = 0,
	VTEE_RPC_RPMB = 1,
	VTEE_RPC_FS = 2,
	VTEE_RPC_GET_TIME = 3,
	VTEE_RPC_NOTIFICATION = 4,
	VTEE_RPC_SUSPEND = 5,
	VTEE_RPC_SHM_ALLOC = 6,
	VTEE_RPC_SHM_FREE = 7,
	VTEE_RPC_BENCH_REG = 20,
	VTEE_RPC_I2C_TRANSFER = 21,
	VTEE_RPC_RPMB_PROBE_RESET = 22,
	VTEE_RPC_RPMB_PROBE_NEXT = 23,
	VTEE_RPC_RPMB_FRAMES = 24,
};

/* Whose memory SHM_ALLOC asks for. */
enum vtee_shm_type {
	VTEE_SHM_APPLICATION = 0,
	VTEE_SHM_KERNEL = 1,
	VTEE_SHM_GLOBAL = 2,
};

/* Parameter types are those of TEE_IOCTL_PARAM_ATTR_TYPE_*. */
#define VTEE_PARAM_TYPE_MASK 0xff
#define VTEE_PARAM_META 0x100
#define VTEE_NULL_REGION 0xffffffffffffffffULL

struct vtee_config {
	__le32 magic;
	__le16 version_major;
	__le16 version_minor;
	__le64 epoch;
	__le32 tee_kind;
	__le32 tee_impl_id;
	__le32 tee_impl_caps;
	__le32 tee_gen_caps;
	__le32 num_request_queues;
	__le32 num_event_buffers;
	__le32 event_buffer_size;
	__le32 max_params;
	__le32 max_contexts;
	__le32 max_sessions;
	__le32 max_regions;
	__le32 max_region_ranges;
	__le64 max_region_bytes;
	__le32 max_calls;
	__le32 max_rpcs;
	__le32 max_inline_bytes;
	__le32 max_request_bytes;
	__le32 rpc_deadline_ms;
	__u8 reserved[36];
};

struct vtee_request_header {
	__le32 type;
	__le32 flags;
	__le64 epoch;
	__le64 tag;
	__le32 context;
	__u8 reserved[4];
};

struct vtee_response_header {
	__le32 status;
	__le32 flags;
	__le32 ret;
	__le32 origin;
};

struct vtee_param {
	__le64 attr;
	__le64 a;
	__le64 b;
	__le64 c;
};

struct vtee_memory_range {
	__le64 address;
	__le64 length;
};

struct vtee_open_context {
	__le32 flags;
	__u8 reserved[4];
};

struct vtee_open_context_response {
	__le32 context;
	__u8 reserved[4];
};

struct vtee_open_session {
	__u8 uuid[16];
	__u8 client_uuid[16];
	__le32 client_login;
	__le32 num_params;
};

struct vtee_open_session_response {
	__le32 session;
	__le32 num_params;
};

struct vtee_close_session {
	__le32 session;
	__u8 reserved[4];
};

struct vtee_invoke {
	__le32 session;
	__le32 func;
	__le32 num_params;
	__u8 reserved[4];
};

struct vtee_invoke_response {
	__le32 num_params;
	__u8 reserved[4];
};

struct vtee_register_memory {
	__le32 flags;
	__le32 num_ranges;
	__le64 size;
};

struct vtee_register_response {
	__le32 region;
	__u8 reserved[4];
};

struct vtee_unregister_memory {
	__le32 region;
	__u8 reserved[4];
};

struct vtee_cancel {
	__le64 tag;
};

struct vtee_rpc_reply {
	__le32 rpc;
	__le32 ret;
	__le32 origin;
	__le32 num_params;
};

struct vtee_rpc_withdrawn_ack {
	__le32 rpc;
	__u8 reserved[4];
};

struct vtee_event_header {
	__le32 type;
	__le32 flags;
	__le64 epoch;
};

struct vtee_rpc_event {
	__le32 rpc;
	__le32 command;
	__le32 target;
	__le32 deadline_ms;
	__le64 call;
	__le32 context;
	__le32 session;
	__le32 num_params;
	__u8 reserved[4];
};

struct vtee_rpc_withdrawn_event {
	__le32 rpc;
	__u8 reserved[4];
};

struct vtee_notification_event {
	__le32 value;
	__u8 reserved[4];
};

#endif
