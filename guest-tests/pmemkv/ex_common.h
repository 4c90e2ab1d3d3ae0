/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/* The definitions that libpmemobj's example maps need from a header that Debian does not ship. */
#ifndef EX_COMMON_H
#define EX_COMMON_H
#include <stdint.h>
#include <sys/stat.h>
#include <unistd.h>
#define CREATE_MODE_RW (S_IWUSR | S_IRUSR)
#define MIN(a, b) (((a) < (b)) ? (a) : (b))
#endif
