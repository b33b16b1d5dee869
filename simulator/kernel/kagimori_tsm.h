/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * What crosses /dev/kagimori-tsm: a read gives one request, a write takes its
 * answer whole. Little-endian, without holes; tsm_provider.py is the other end.
 */
#ifndef KAGIMORI_TSM_H
#define KAGIMORI_TSM_H

#include <linux/types.h>

#define KAGIMORI_TSM_INBLOB_MAX		64
#define KAGIMORI_TSM_NAME_MAX		64
#define KAGIMORI_TSM_SERVICE		1

/**
 * struct kagimori_tsm_request - the options of one report
 * @number: what the answer has to repeat
 * @flags: KAGIMORI_TSM_SERVICE where a service provider was named
 * @privlevel: as written, or 0
 * @manifest_version: as written, or 0
 * @inblob_size: bytes of @inblob, at least 1
 * @inblob: what the report has to be over
 * @service_guid: in the mixed byte order of guid_t, or zeros
 * @service_provider: ends with a NUL
 */
struct kagimori_tsm_request {
	__u32 number;
	__u32 flags;
	__u32 privlevel;
	__u32 manifest_version;
	__u32 inblob_size;
	__u8 inblob[KAGIMORI_TSM_INBLOB_MAX];
	__u8 service_guid[16];
	char service_provider[KAGIMORI_TSM_NAME_MAX];
};

/**
 * struct kagimori_tsm_answer - the head of an answer; its blobs follow in order
 * @number: that of the request
 * @error: an errno, and no blobs; or 0
 * @outblob_size: at least 1 if there is no error
 * @auxblob_size: may be 0
 * @manifestblob_size: may be 0
 */
struct kagimori_tsm_answer {
	__u32 number;
	__u32 error;
	__u32 outblob_size;
	__u32 auxblob_size;
	__u32 manifestblob_size;
};

#endif
