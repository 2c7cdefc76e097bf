"""A table over two processes under row-wise Adagrad, by TorchRec or by this package. Not a test: `test_torchrec.py`
starts it once for each, and compares the rows.

TorchRec runs without this package, and this package without TorchRec.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes


RANKS, LEARNING_RATE, EPS = 2, 0.3, 1e-10


def by_torchrec(data: dict, rank: int) -> torch.Tensor:
    """(rows, width): the rows of all processes, after TorchRec has trained them in its row-wise sharding."""
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from torchrec import EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
    from torchrec.distributed import DistributedModelParallel
    from torchrec.distributed.embedding import EmbeddingCollectionSharder
    from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise
    from torchrec.distributed.types import ShardingPlan

    rows, width = data["rows"].shape
    table = EmbeddingConfig(name="table", embedding_dim=width, num_embeddings=rows, feature_names=["ids"])
    collection = EmbeddingCollection(tables=[table], device=torch.device("meta"))
    sharder = EmbeddingCollectionSharder(
        fused_params={
            "optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
            "learning_rate": LEARNING_RATE,
            "eps": EPS,
        }
    )
    plan = construct_module_sharding_plan(
        collection,
        {"table": row_wise(compute_kernel="fused")},
        sharder,
        local_size=RANKS,
        world_size=RANKS,
        device_type="cpu",
    )
    model = DistributedModelParallel(
        collection, device=torch.device("cpu"), plan=ShardingPlan({"": plan}), sharders=[sharder]
    )
    (sharded,) = model.state_dict().values()
    (shard,) = sharded.local_shards()
    begin, count = shard.metadata.shard_offsets[0], shard.metadata.shard_sizes[0]
    shard.tensor.copy_(data["rows"][begin : begin + count])
    for step in data["steps"]:
        ids, weights = step[rank]
        # One sample of a length of its own: TorchRec wants as many samples of all processes.
        given = KeyedJaggedTensor(keys=["ids"], values=ids, lengths=torch.tensor([len(ids)]))
        found = model(given)["ids"].values()
        (found * weights).sum().backward()
    parts = [torch.empty(RANKS - 1 + rows // RANKS, width) for _ in range(RANKS)]
    own = torch.zeros_like(parts[0])
    own[:count] = shard.tensor
    dist.all_gather(parts, own)
    chunk = -(-rows // RANKS)
    return torch.cat([part[: min(chunk, rows - i * chunk)] for i, part in enumerate(parts)])


def by_engram(data: dict, rank: int) -> torch.Tensor:
    """The same, of a table that is cut over the processes."""
    from engram_hf import RowwiseAdagrad
    from engram_hf.modeling.disk_files import BlockSource, TableFile
    from engram_hf.modeling.disk_safetensors import TensorContent, write_file
    from engram_hf.modeling.table import EngramTable, tables_without_blocks
    from engram_hf.modeling.table_cut import open_parts
    from engram_hf.modeling.table_formats import row_format
    from engram_hf.modeling.table_ranks import start_ranks
    from engram_hf.training.row_exchange import RowExchange
    from engram_hf.training.row_updates import RowUpdates

    path, service = data["folder"] / f"table{rank}.safetensors", start_ranks()
    write_file(path, {"blocks.0": TensorContent.of(data["rows"])})
    rows, width = data["rows"].shape
    with tables_without_blocks():
        table = EngramTable([rows], width, rows * width, row_format("float32"))
    sources = open_parts(
        {("table", 0): BlockSource(TableFile(path), "blocks.0")}, {"table": table.cut_over_ranks(service)}, rank
    )
    table.open_blocks(list(sources.values()), ["host"], ["cpu"])
    table.train()
    exchange = RowExchange()
    updates = RowUpdates("table", table, RowwiseAdagrad(eps=EPS), exchange=exchange)
    exchange.add(table)
    exchange.follow(table, [])
    service.meet()
    for step in data["steps"]:
        ids, weights = step[rank]
        (table(ids[:, None]) * weights).sum().backward()
        updates.step(LEARNING_RATE)
        updates.gradients.norm.grad = None
    found = table.gather_rows(torch.arange(rows))
    service.meet()
    return found


def run(rank: int, folder: Path, way: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/{way}", rank=rank, world_size=RANKS)
    data = {**torch.load(folder / "data.pt"), "folder": folder}
    rows = {"torchrec": by_torchrec, "engram": by_engram}[way](data, rank)
    torch.save(rows, folder / f"{way}{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    start_processes(run, (Path(sys.argv[1]), sys.argv[2]), nprocs=RANKS, start_method="fork")
