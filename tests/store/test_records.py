"""Record files: what was written comes back bit for bit or an error names it; nothing half-made is seen."""

import json
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from undercroft.errors import (
    BudgetExceeded,
    CorruptRecord,
    InvalidInput,
    SpillMisuse,
    TierFull,
    TransferFailed,
    UndercroftError,
)
from undercroft.store.budget import Budget
from undercroft.store.disk import Iovec, Syscalls
from undercroft.store.record import DTYPES
from undercroft.store.records import RecordFile
from undercroft.store.slab import Lease, Slab
from undercroft.store.writer import RecordWriter
from undercroft.testing import FlakyDisk, FullDisk
from undercroft.units import MIB

BLOCK = 4096
KEY = ("layers.0.expert", "int8")

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.records"


def noise(nbytes: int, seed: int = 0) -> bytes:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator).numpy().tobytes()


def write(path: Path, contents: dict[tuple[str, str], bytes], **options) -> None:
    with RecordWriter(path, **options) as writer:
        for (name, kind), content in contents.items():
            writer.add(name, kind, content)


def leased(slab: Slab, nbytes: int) -> Lease:
    lease = slab.lease(nbytes)
    assert lease is not None
    return lease


def read(file: RecordFile, key: tuple[str, str]) -> torch.Tensor:
    lease = leased(Slab(file[key].occupied), file[key].occupied)
    file.read(key, lease)
    return file[key].tensor(lease)


def read_bytes(file: RecordFile, key: tuple[str, str]) -> bytes:
    return read(file, key).reshape(-1).view(torch.uint8).numpy().tobytes()


class TestRoundTrip:
    @settings(deadline=None, max_examples=30)
    @given(
        contents=st.dictionaries(
            st.tuples(st.text(min_size=1), st.text(min_size=1)),
            st.integers(1, 3 * BLOCK) | st.sampled_from([BLOCK - 1, BLOCK, BLOCK + 1, 4 * MIB, 4 * MIB + 1]),
            max_size=6,
        )
    )
    def test_any_records_come_back_bit_for_bit(
        self, tmp_path_factory: pytest.TempPathFactory, contents: dict[tuple[str, str], int]
    ) -> None:
        path = tmp_path_factory.mktemp("round") / "file"
        written = {key: noise(nbytes, seed) for seed, (key, nbytes) in enumerate(contents.items())}
        write(path, written)
        with RecordFile.open(path) as file:
            assert list(file) == list(written)
            assert {key: read_bytes(file, key) for key in file} == written

    @pytest.mark.parametrize("name", DTYPES)
    def test_a_tensor_of_any_type_keeps_its_type_shape_and_bits(self, path: Path, name: str) -> None:
        dtype = DTYPES[name]
        raw = torch.tensor(list(noise(6 * dtype.itemsize)), dtype=torch.uint8)
        tensor = (raw > 127).reshape(2, 3) if dtype == torch.bool else raw.view(dtype).reshape(2, 3)
        with RecordWriter(path) as writer:
            writer.add(*KEY, tensor)
        with RecordFile.open(path) as file:
            back = read(file, KEY)
            assert (back.dtype, back.shape, file[KEY].dtype) == (dtype, (2, 3), name)
            assert read_bytes(file, KEY) == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()

    def test_a_scalar_keeps_its_shape(self, path: Path) -> None:
        with RecordWriter(path) as writer:
            writer.add(*KEY, torch.tensor(1.5))
        with RecordFile.open(path) as file:
            assert read(file, KEY) == torch.tensor(1.5)

    def test_parts_are_stored_one_after_another_and_metadata_tells_them_apart(self, path: Path) -> None:
        weight, scale = torch.arange(6, dtype=torch.int8), torch.tensor([0.5, 2.0])
        with RecordWriter(path, metadata={"model": "tiny"}) as writer:
            writer.add(*KEY, weight, scale, metadata={"scale": 6})
        with RecordFile.open(path) as file:
            content = read(file, KEY)
            assert torch.equal(content[:6].view(torch.int8), weight)
            assert torch.equal(content[file[KEY].metadata["scale"] :].clone().view(torch.float32), scale)
            assert file.metadata == {"model": "tiny"}

    def test_bytes_may_be_given_a_type_and_a_shape(self, path: Path) -> None:
        with RecordWriter(path) as writer:
            writer.add(*KEY, bytearray(range(24)), dtype="int16", shape=[3, 4])
        with RecordFile.open(path) as file:
            assert torch.equal(read(file, KEY), torch.arange(24).to(torch.uint8).view(torch.int16).view(3, 4))

    def test_a_record_larger_than_any_buffer_or_chunk(self, path: Path) -> None:
        content = noise(17 * MIB + 123)
        write(path, {KEY: content})
        with RecordFile.open(path) as file:
            assert len(file.chunks([(file[KEY], 0)])) == 3
            assert read_bytes(file, KEY) == content

    def test_a_file_without_records(self, path: Path) -> None:
        write(path, {})
        with RecordFile.open(path) as file:
            assert len(file) == 0

    def test_links_to_both_files_are_followed(self, path: Path, tmp_path: Path) -> None:
        write(tmp_path / "blob", {KEY: b"content"})
        path.symlink_to("blob")
        Path(f"{path}.json").symlink_to("blob.json")
        with RecordFile.open(path) as file:
            assert read_bytes(file, KEY) == b"content"

    @pytest.mark.root
    def test_a_file_system_without_direct_io(self, mount: Callable[..., Path]) -> None:
        path = mount("ramfs") / "file"
        write(path, {KEY: noise(5 * MIB)})
        with RecordFile.open(path) as file:
            assert not file.direct
            assert read_bytes(file, KEY) == noise(5 * MIB)


class TestWriting:
    def test_records_begin_on_blocks_and_zeros_lie_between(self, path: Path) -> None:
        write(path, {("a", "x"): b"\xff" * 10, ("b", "x"): b"\xff" * (BLOCK + 1)})
        data = path.read_bytes()
        assert len(data) == 3 * BLOCK
        assert data[:10] == b"\xff" * 10
        assert data[10:BLOCK] == bytes(BLOCK - 10)
        assert data[2 * BLOCK + 1 :] == bytes(BLOCK - 1)

    def test_both_files_are_private(self, path: Path) -> None:
        write(path, {KEY: b"content"})
        assert {stat.S_IMODE(each.stat().st_mode) for each in path.parent.iterdir()} == {0o600}

    def test_nothing_has_its_name_before_the_end(self, path: Path) -> None:
        with RecordWriter(path) as writer:
            writer.add(*KEY, b"content")
            assert [each.name for each in path.parent.iterdir()] == ["model.records.partial"]
        assert {each.name for each in path.parent.iterdir()} == {"model.records", "model.records.json"}

    def test_a_block_that_raises_leaves_nothing(self, path: Path) -> None:
        def give_up() -> None:
            with RecordWriter(path) as writer:
                writer.add(*KEY, noise(5 * MIB))
                raise KeyError

        with pytest.raises(KeyError):
            give_up()
        assert list(path.parent.iterdir()) == []

    @pytest.mark.parametrize("existing", ["model.records", "model.records.json"])
    def test_what_exists_is_never_replaced(self, path: Path, existing: str) -> None:
        (path.parent / existing).write_text("precious")
        with pytest.raises(InvalidInput, match="exists"):
            RecordWriter(path)
        assert [each.read_text() for each in path.parent.iterdir()] == ["precious"]

    def test_two_writers_of_one_file_do_not_mix(self, path: Path) -> None:
        with RecordWriter(path) as writer:
            with pytest.raises(SpillMisuse, match="being written"):
                RecordWriter(path)
            writer.add(*KEY, b"the first")
        with RecordFile.open(path) as file:
            assert read_bytes(file, KEY) == b"the first"

    def test_of_many_writers_of_one_file_one_succeeds(self, path: Path) -> None:
        outcomes: list[object] = []

        def try_often(content: bytes) -> None:
            for _ in range(30):
                try:
                    write(path, {KEY: content})
                    outcomes.append(content)
                except (SpillMisuse, InvalidInput):
                    continue
                except UndercroftError as error:
                    outcomes.append(error)

        threads = [threading.Thread(target=try_often, args=(bytes([number]),)) for number in range(1, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with RecordFile.open(path) as file:
            assert outcomes == [read_bytes(file, KEY)]
        assert len(list(path.parent.iterdir())) == 2

    @pytest.mark.parametrize(
        ("arguments", "options", "complaint"),
        [
            (("", "int8", b"x"), {}, "a name and a kind"),
            (("a", "", b"x"), {}, "a name and a kind"),
            ((*KEY, b"again"), {}, "already"),
            (("a", "x"), {}, "0 bytes"),
            (("a", "x", b""), {}, "0 bytes"),
            (("a", "x", torch.empty(0, 3)), {}, "0 bytes"),
            (("a", "x", b"123"), {"dtype": "int16"}, "3 bytes"),
            (("a", "x", b"1234"), {"dtype": "int16", "shape": (3,)}, "4 bytes"),
            (("a", "x", b"1234"), {"shape": (-2, -2)}, "4 bytes"),
            (("a", "x", b"1234"), {"dtype": "text"}, "no dtype"),
            (("a", "x", torch.arange(6).view(2, 3).T), {}, "contiguous"),
            (("a", "x", torch.empty(3, device="meta")), {}, "CPU"),
            (("a", "x", torch.zeros(2, dtype=torch.complex64).conj()), {}, "contiguous"),
            (("a", "x", memoryview(b"1234")[::2]), {}, "contiguous"),
            (("a", "x", b"1"), {"metadata": {"when": float("nan")}}, "JSON"),
            (("a", "x", b"1"), {"metadata": {"what": object()}}, "JSON"),
        ],
    )
    def test_a_record_that_cannot_be_is_refused_and_the_file_goes_on(
        self, path: Path, arguments: tuple, options: dict, complaint: str
    ) -> None:
        with RecordWriter(path) as writer:
            writer.add(*KEY, b"before")
            with pytest.raises(InvalidInput, match=complaint):
                writer.add(*arguments, **options)
            writer.add("after", "x", b"after")
        with RecordFile.open(path) as file:
            assert {key: read_bytes(file, key) for key in file} == {KEY: b"before", ("after", "x"): b"after"}

    def test_a_closed_writer_takes_nothing(self, path: Path) -> None:
        with RecordWriter(path) as writer:
            pass
        with pytest.raises(SpillMisuse, match="closed"):
            writer.add(*KEY, b"late")

    def test_the_buffer_is_all_it_holds_whatever_it_writes(self, path: Path) -> None:
        budget = Budget(host=4 * MIB)
        with RecordWriter(path, budget=budget) as writer:
            writer.add(*KEY, noise(9 * MIB))
            assert budget.holders("host") == {"record writer": 4 * MIB}
        assert budget.held("host") == 0

    def test_without_room_for_the_buffer_nothing_begins(self, path: Path) -> None:
        with pytest.raises(BudgetExceeded):
            RecordWriter(path, budget=Budget(host=4 * MIB - 1))
        assert list(path.parent.iterdir()) == []

    def test_a_directory_that_is_missing(self, tmp_path: Path) -> None:
        with pytest.raises(TransferFailed, match="No such file"):
            RecordWriter(tmp_path / "missing" / "file")


class TestFailingDisks:
    CONTENTS: ClassVar = {(str(number), "x"): noise(MIB) for number in range(10)}

    def test_a_full_disk_leaves_nothing(self, path: Path) -> None:
        budget = Budget()
        with pytest.raises(TierFull):
            write(path, self.CONTENTS, budget=budget, syscalls=FullDisk(5 * MIB))
        assert list(path.parent.iterdir()) == []
        assert budget.held("host") == 0

    def test_a_disk_that_is_full_when_the_index_is_written_leaves_nothing(self, path: Path) -> None:
        with pytest.raises(TierFull):
            write(path, {KEY: noise(MIB)}, syscalls=FullDisk(MIB))
        assert list(path.parent.iterdir()) == []

    @pytest.mark.root
    def test_a_file_system_that_is_full(self, mount: Callable[..., Path]) -> None:
        directory = mount("tmpfs", "size=8m")
        with pytest.raises(TierFull):
            write(directory / "file", self.CONTENTS)
        assert list(directory.iterdir()) == []

    @pytest.fixture
    def small_file_limit(self) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5 * MIB + 512, before[1]))
        yield
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    @pytest.mark.usefixtures("small_file_limit")
    def test_a_limit_on_file_sizes_is_a_full_tier(self, path: Path) -> None:
        with pytest.raises(TierFull):
            write(path, {KEY: noise(9 * MIB)})
        assert list(path.parent.iterdir()) == []

    def test_a_failed_write_is_not_forgotten_by_catching_it(self, path: Path) -> None:
        disk = FlakyDisk(call="pwritev", times=2)

        def go_on_regardless() -> None:
            with RecordWriter(path, syscalls=disk) as writer:
                with pytest.raises(TransferFailed):
                    writer.add(*KEY, noise(5 * MIB))
                with pytest.raises(SpillMisuse, match="failed before"):
                    writer.add("another", "x", b"1")

        with pytest.raises(SpillMisuse, match="earlier record failed"):
            go_on_regardless()
        assert list(path.parent.iterdir()) == []

    def test_a_single_error_of_the_device_is_overcome(self, path: Path) -> None:
        with RecordWriter(path, syscalls=FlakyDisk(call="pwritev")) as writer:
            writer.add(*KEY, noise(5 * MIB))
        with RecordFile.open(path) as file:
            assert read_bytes(file, KEY) == noise(5 * MIB)


class TestKilledWriter:
    SCRIPT = """
import sys
from undercroft.store.writer import RecordWriter
with RecordWriter(sys.argv[1]) as writer:
    writer.add("a", "x", bytes(5 * 2**20))
    print("written", flush=True)
    sys.stdin.read()
"""

    @pytest.fixture
    def killed(self, path: Path) -> Path:
        """A path whose writer was killed in the middle."""
        command = [sys.executable, "-c", self.SCRIPT, str(path)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"written\n"
            process.kill()
        assert process.returncode == -signal.SIGKILL
        return path

    def test_there_is_no_file_and_the_next_writer_takes_over(self, killed: Path) -> None:
        assert [each.name for each in killed.parent.iterdir()] == ["model.records.partial"]
        with pytest.raises(InvalidInput, match="no record file"):
            RecordFile.open(killed)
        write(killed, {KEY: b"short"})
        assert {each.name for each in killed.parent.iterdir()} == {"model.records", "model.records.json"}
        with RecordFile.open(killed) as file:
            assert read_bytes(file, KEY) == b"short"


class FlippingDisk(Syscalls):
    """Flips a bit of what the first reads bring, as bad memory or a bad cable does."""

    def __init__(self, reads: int, offset: int) -> None:
        super().__init__()
        self._left, self._offset = reads, offset

    def preadv(self, fd: int, iovecs: Sequence[Iovec], offset: int) -> int:
        import ctypes

        moved = super().preadv(fd, iovecs, offset)
        address, nbytes = iovecs[0]
        if self._left and nbytes > BLOCK and offset <= self._offset < offset + nbytes:
            self._left -= 1
            ctypes.c_ubyte.from_address(address + self._offset - offset).value ^= 1
        return moved


class TestReading:
    CONTENTS: ClassVar = {
        ("a", "x"): noise(3 * BLOCK, 1),
        ("b", "x"): noise(2 * BLOCK + 5, 2),
        ("c", "y"): noise(10, 3),
    }

    @pytest.fixture
    def written(self, path: Path) -> Path:
        write(path, self.CONTENTS)
        return path

    def flip(self, path: Path, offset: int) -> None:
        with path.open("r+b") as file:
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ 1]))

    def test_a_missing_file_is_said_to_be_missing(self, path: Path) -> None:
        with pytest.raises(InvalidInput, match="there is no record file here"):
            RecordFile.open(path)

    def test_an_index_without_data(self, written: Path) -> None:
        written.unlink()
        with pytest.raises(TransferFailed, match="No such file"):
            RecordFile.open(written)

    def test_a_way_to_verify_that_does_not_exist(self, written: Path) -> None:
        with pytest.raises(InvalidInput, match="sometimes"):
            RecordFile.open(written, verify="sometimes")

    def test_data_that_was_cut_names_the_first_record_that_suffers(self, written: Path) -> None:
        os.truncate(written, 5 * BLOCK)
        with pytest.raises(CorruptRecord, match=r"\('b', 'x'\) is cut off"):
            RecordFile.open(written)

    def test_data_that_is_cut_later_names_the_record_that_is_read(self, written: Path) -> None:
        with RecordFile.open(written) as file:
            os.truncate(written, 5 * BLOCK)
            assert read_bytes(file, ("a", "x")) == self.CONTENTS["a", "x"]
            with pytest.raises(CorruptRecord, match=r"record \('b', 'x'\)"):
                read(file, ("b", "x"))

    def test_data_of_another_length_is_of_another_index(self, written: Path) -> None:
        os.truncate(written, 8 * BLOCK)
        with pytest.raises(CorruptRecord, match="its index says"):
            RecordFile.open(written)

    def test_a_flipped_bit_is_found_and_costs_one_record_only(self, written: Path) -> None:
        self.flip(written, 3 * BLOCK + 7)
        with RecordFile.open(written) as file:
            with pytest.raises(CorruptRecord, match=r"record \('b', 'x'\).*checksum"):
                read(file, ("b", "x"))
            assert read_bytes(file, ("a", "x")) == self.CONTENTS["a", "x"]
            assert read_bytes(file, ("c", "y")) == self.CONTENTS["c", "y"]

    def test_the_zeros_between_records_do_not_matter(self, written: Path) -> None:
        self.flip(written, 6 * BLOCK - 1)
        with RecordFile.open(written) as file:
            assert read_bytes(file, ("b", "x")) == self.CONTENTS["b", "x"]

    @pytest.mark.parametrize(("verify", "notices"), [("once", False), ("always", True), ("never", False)])
    def test_how_often_a_record_is_verified(self, written: Path, verify, notices: bool) -> None:
        with RecordFile.open(written, verify=verify) as file:
            read(file, ("b", "x"))
            self.flip(written, 3 * BLOCK)
            if notices:
                with pytest.raises(CorruptRecord):
                    read(file, ("b", "x"))
            else:
                assert read_bytes(file, ("b", "x")) != self.CONTENTS["b", "x"]

    def test_never_verifying_takes_what_comes(self, written: Path) -> None:
        self.flip(written, 3 * BLOCK)
        with RecordFile.open(written, verify="never") as file:
            assert read_bytes(file, ("b", "x")) != self.CONTENTS["b", "x"]

    def test_bytes_that_were_wrong_once_are_read_again(self, written: Path) -> None:
        with RecordFile.open(written, syscalls=FlippingDisk(1, 3 * BLOCK + 1)) as file:
            assert read_bytes(file, ("b", "x")) == self.CONTENTS["b", "x"]

    def test_bytes_that_were_wrong_twice_are_given_up(self, written: Path) -> None:
        with RecordFile.open(written, syscalls=FlippingDisk(2, 3 * BLOCK + 1)) as file:
            with pytest.raises(CorruptRecord, match="in two reads"):
                read(file, ("b", "x"))
            assert read_bytes(file, ("b", "x")) == self.CONTENTS["b", "x"]

    @pytest.mark.parametrize(("times", "error"), [(1, None), (3, None), (4, TransferFailed)])
    def test_a_disk_that_fails_for_a_while(
        self, written: Path, times: int, error: type[UndercroftError] | None
    ) -> None:
        disk = FlakyDisk(at=2, times=times)  # the first read only asks whether the file can be read directly
        with RecordFile.open(written, syscalls=disk) as file:
            if error is None:
                assert read_bytes(file, ("a", "x")) == self.CONTENTS["a", "x"]
            else:
                with pytest.raises(error):
                    read(file, ("a", "x"))
        assert disk.failed == times

    def test_a_record_that_is_not_there_and_a_lease_that_is_too_small(self, written: Path) -> None:
        slab = Slab(16 * BLOCK)
        with RecordFile.open(written) as file:
            with pytest.raises(InvalidInput, match="no record"):
                file.read(("a", "y"), leased(slab, BLOCK))
            with pytest.raises(InvalidInput, match="occupies 12288 bytes"):
                file.read(("a", "x"), leased(slab, 2 * BLOCK))

    def test_it_is_a_mapping_of_keys_to_records(self, written: Path) -> None:
        with RecordFile.open(written) as file:
            assert set(file) == set(self.CONTENTS)
            assert ("a", "x") in file
            assert ("a", "y") not in file
            assert {record.key: record.nbytes for record in file.values()} == {
                key: len(content) for key, content in self.CONTENTS.items()
            }

    def test_the_index_is_plain_json(self, written: Path) -> None:
        index = json.loads(Path(f"{written}.json").read_text())
        assert (index["format"], index["version"], index["data_nbytes"]) == (
            "undercroft-records",
            1,
            7 * BLOCK,
        )
        assert [entry["offset"] for entry in index["records"]] == [0, 3 * BLOCK, 6 * BLOCK]
