/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * kv load POOL MAP COUNT - makes a pool with a map of libpmemobj; adds, overwrites and removes
 * values, one transaction each, and prints acked=N when transaction N has returned. COUNT 0: without
 * end.
 *
 * kv verify POOL MAP LAST - opens the pool, which recovers it, and checks that the map is in the
 * state after transaction LAST or after a later transaction: no transaction is partial or out of
 * order, and no acknowledged one is missing.
 *
 * MAP is hashmap or rbtree (btree and ctree crash on any file). pmemkv, which no package registry
 * has, uses the same library.
 */
#include <ex_common.h>
#include <inttypes.h>
#include <libpmem.h>
#include <libpmemobj.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "map.h"
#include "map_rbtree.h"
#include "map_hashmap_tx.h"

#define POOL_BYTES (32UL << 20)
#define KEYS 64
#define MOST_BYTES 1500
/* Largest number of transactions whose acknowledgements the host has not received. */
#define ACKS_IN_FLIGHT 1000

POBJ_LAYOUT_BEGIN(kv);
POBJ_LAYOUT_ROOT(kv, struct root);
POBJ_LAYOUT_TOID(kv, struct item);
POBJ_LAYOUT_END(kv);

struct root {
	TOID(struct map) map;
};

struct item {
	uint64_t key, generation, bytes;
	uint8_t data[MOST_BYTES];
};

static PMEMobjpool *pool;
static struct map_ctx *ctx;
static TOID(struct map) map;

static uint64_t scatter(uint64_t n)
{
	n += 0x9e3779b97f4a7c15;
	n = (n ^ (n >> 30)) * 0xbf58476d1ce4e5b9;
	n = (n ^ (n >> 27)) * 0x94d049bb133111eb;
	return n ^ (n >> 31);
}

static uint64_t key_of(uint64_t n)
{
	return scatter(n) % KEYS;
}

static int removes(uint64_t n)
{
	return n % 4 == 3;
}

static void fail(const char *what)
{
	printf("FAIL: %s: %s\n", what, pmemobj_errormsg());
	exit(1);
}

static void fill(struct item *item, uint64_t key, uint64_t n)
{
	item->key = key;
	item->generation = n;
	item->bytes = 16 + scatter(n ^ key) % (MOST_BYTES - 16);
	for (uint64_t i = 0; i < item->bytes; i++)
		item->data[i] = (uint8_t)(scatter(n) >> (i % 56)) + (uint8_t)i;
}

static void transaction(uint64_t n)
{
	uint64_t key = key_of(n);
	TX_BEGIN(pool) {
		PMEMoid old = map_remove(ctx, map, key);
		if (!OID_IS_NULL(old))
			pmemobj_tx_free(old);
		if (!removes(n)) {
			TOID(struct item) item = TX_ZNEW(struct item);
			fill(D_RW(item), key, n);
			if (map_insert(ctx, map, key, item.oid) != 0)
				pmemobj_tx_abort(1);
		}
	} TX_ONABORT {
		fail("a transaction");
	} TX_END
}

static void open_pool(const char *path, const char *kind)
{
	const struct map_ops *ops = strcmp(kind, "rbtree") == 0 ? MAP_RBTREE : MAP_HASHMAP_TX;
	int new = access(path, F_OK) != 0;
	pool = new ? pmemobj_create(path, POBJ_LAYOUT_NAME(kv), POOL_BYTES, CREATE_MODE_RW)
		   : pmemobj_open(path, POBJ_LAYOUT_NAME(kv));
	if (pool == NULL)
		fail("the pool");
	ctx = map_ctx_init(ops, pool);
	TOID(struct root) root = POBJ_ROOT(pool, struct root);
	if (TOID_IS_NULL(D_RO(root)->map) && map_create(ctx, &D_RW(root)->map, NULL) != 0)
		fail("the map");
	map = D_RO(root)->map;
	if (map_check(ctx, map) != 0)
		fail("map_check");
	printf("is_pmem=%d\n", pmem_is_pmem(pool, 4096));
}

/* The generation of each key after n transactions, counted from 1; 0: the key has no value. */
static void expect(uint64_t n, uint64_t *generations)
{
	memset(generations, 0, KEYS * sizeof(*generations));
	for (uint64_t i = 0; i < n; i++)
		generations[key_of(i)] = removes(i) ? 0 : i + 1;
}

static int collect(uint64_t key, PMEMoid value, void *found)
{
	const struct item *item = pmemobj_direct(value);
	struct item good = {0};
	if (item == NULL || key >= KEYS || item->key != key)
		fail("a value of another key");
	fill(&good, key, item->generation);
	if (item->bytes != good.bytes || memcmp(item->data, good.data, good.bytes) != 0)
		fail("LOST: a value with other bytes");
	((uint64_t *)found)[key] = item->generation + 1;
	return 0;
}

/* Number of transactions in the pool; fails if it is below `least`. */
static uint64_t done(uint64_t least)
{
	uint64_t found[KEYS] = {0}, expected[KEYS];
	map_foreach(ctx, map, collect, found);
	for (uint64_t n = least; n < least + ACKS_IN_FLIGHT; n++) {
		expect(n, expected);
		if (memcmp(found, expected, sizeof(found)) == 0)
			return n;
	}
	fail("LOST: the map is in the state after none of the expected transactions");
	return 0;
}

int main(int argc, char **argv)
{
	if (argc != 5)
		return 2;
	setvbuf(stdout, NULL, _IOLBF, 0);
	uint64_t number = strtoull(argv[4], NULL, 10);
	open_pool(argv[2], argv[3]);
	if (strcmp(argv[1], "verify") == 0) {
		printf("transactions=%" PRIu64 "\n", done(number + 1));
		map_ctx_free(ctx);
		pmemobj_close(pool);
		if (pmemobj_check(argv[2], POBJ_LAYOUT_NAME(kv)) != 1)
			fail("pmemobj_check");
		return 0;
	}
	for (uint64_t n = 0; number == 0 || n < number; n++) {
		transaction(n);
		printf("acked=%" PRIu64 "\n", n);
	}
	map_ctx_free(ctx);
	pmemobj_close(pool);
	return 0;
}
