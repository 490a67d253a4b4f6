"""Every layout that FF-A puts into buffers, as construct definitions: the single definition of each.

A version's own form has the version at the end of its name and serves all later ones until the next. Sources: DEN0077
1.0 to 1.2; Hafnium's ``inc/vmapi/hf/ffa.h`` and ``ffa_memory.h``; Xen's ``ffa_shm.c`` and ``ffa_msg.c``.
"""

from __future__ import annotations

from construct import Bytes, Int8ul, Int16ul, Int32ul, Int64ul, Struct

from pyvhost.codec import Codec, Reserved

Transaction10 = Struct(
    "sender" / Int16ul * "endpoint that owns the memory",
    "attributes" / Int8ul * "memory region attributes",
    Reserved(1),
    "flags" / Int32ul * "transaction flags",
    "handle" / Int64ul * "0 in a send; the handle in a retrieve",
    "tag" / Int64ul * "chosen by the sender, repeated by receivers",
    Reserved(4),
    "count" / Int32ul * "receivers, which follow directly",
)
Transaction11 = Struct(
    "sender" / Int16ul * "endpoint that owns the memory",
    "attributes" / Int16ul * "memory region attributes",
    "flags" / Int32ul * "transaction flags",
    "handle" / Int64ul * "0 in a send; the handle in a retrieve",
    "tag" / Int64ul * "chosen by the sender, repeated by receivers",
    "entry_size" / Int32ul * "bytes of a receiver's entry",
    "count" / Int32ul * "receivers",
    "entry_offset" / Int32ul * "from the start of this descriptor to the first receiver; 16-aligned",
    Reserved(12),
)

Access10 = Struct(
    "endpoint" / Int16ul * "receiver",
    "permissions" / Int8ul * "data access in bits 0-1, instruction access in bits 2-3",
    "flags" / Int8ul * "bit 0: not a retrieval but a stream endpoint",
    "composite" / Int32ul * "offset of the address ranges from the descriptor's start; 0 in a retrieve",
    Reserved(8),
)
Access12 = Struct(
    "endpoint" / Int16ul * "receiver",
    "permissions" / Int8ul * "data access in bits 0-1, instruction access in bits 2-3",
    "flags" / Int8ul * "bit 0: not a retrieval but a stream endpoint",
    "composite" / Int32ul * "offset of the address ranges from the descriptor's start; 0 in a retrieve",
    "impdef" / Int64ul[2] * "implementation-defined words, which sender and receiver must agree on",
    Reserved(8),
)

Composite = Struct(
    "pages" / Int32ul * "pages in all ranges together",
    "count" / Int32ul * "address ranges, which follow",
    Reserved(8),
)
Range = Struct(
    "address" / Int64ul * "first byte; page-aligned",
    "pages" / Int32ul * "pages of 4 KiB",
    Reserved(4),
)

Relinquish = Struct(
    "handle" / Int64ul * "the region's handle",
    "flags" / Int32ul * "bit 0 clear, bit 1 time slicing",
    "count" / Int32ul * "endpoints, whose 16-bit ids follow",
)

Message11 = Struct(
    "flags" / Int32ul * "0",
    Reserved(4),
    "offset" / Int32ul * "from the start of this header to the payload",
    "receiver" / Int16ul * "endpoint that gets the message",
    "sender" / Int16ul * "endpoint that sends it",
    "size" / Int32ul * "bytes of the payload",
)
Message12 = Struct(
    "flags" / Int32ul * "0",
    Reserved(4),
    "offset" / Int32ul * "from the start of this header to the payload",
    "receiver" / Int16ul * "endpoint that gets the message",
    "sender" / Int16ul * "endpoint that sends it",
    "size" / Int32ul * "bytes of the payload",
    Reserved(4),
    "uuid" / Bytes(16) * "service that is meant, or nil",
)

Partition10 = Struct(
    "id" / Int16ul * "the partition's endpoint id",
    "contexts" / Int16ul * "execution contexts",
    "properties" / Int32ul * "property bits",
)
Partition11 = Struct(
    "id" / Int16ul * "the partition's endpoint id",
    "contexts" / Int16ul * "execution contexts",
    "properties" / Int32ul * "property bits",
    "uuid" / Bytes(16) * "its UUID if all partitions were asked for, else nil",
)

transaction_10 = Codec("Transaction10", Transaction10)
transaction_11 = Codec("Transaction11", Transaction11)
access_10 = Codec("Access10", Access10)
access_12 = Codec("Access12", Access12)
composite = Codec("Composite", Composite)
address_range = Codec("Range", Range)
relinquish = Codec("Relinquish", Relinquish)
message_11 = Codec("Message11", Message11)
message_12 = Codec("Message12", Message12)
partition_10 = Codec("Partition10", Partition10)
partition_11 = Codec("Partition11", Partition11)

CODECS: tuple[Codec, ...] = (
    *(transaction_10, transaction_11, access_10, access_12, composite, address_range, relinquish),
    *(message_11, message_12, partition_10, partition_11),
)
