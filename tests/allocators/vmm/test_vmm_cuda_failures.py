"""Any call to the CUDA driver may fail: what was done is undone, the books stay the driver's, nothing leaks."""

import contextlib

import pytest
from fake_cuda import RESULT, FakeCuda, FakedCudaDriver
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvarena.allocators.sizes import KB, MB
from kvarena.allocators.vmm.driver import DriverError, OutOfPhysicalMemory

SIZE = 2 * MB


def life(driver):
    """Steps that together use every call; each leaves the driver as it can be continued."""
    base, handles = driver.reserve(8 * SIZE), driver.create(3)
    driver.map(base, SIZE, handles)
    driver.map(base, 5 * SIZE, handles[1:])
    driver.unmap(base, 5 * SIZE, 2)
    driver.unmap(base, SIZE, 3)
    driver.release(handles)
    driver.free(base)


NUM_CALLS = 1 + 3 + (3 + 1) + (2 + 1) + 1 + 1 + 3 + 1


@pytest.mark.parametrize("result", [RESULT.CUDA_ERROR_UNKNOWN, RESULT.CUDA_ERROR_OUT_OF_MEMORY])
@pytest.mark.parametrize("failing", range(NUM_CALLS))
def test_whichever_call_fails_the_books_stay_the_drivers_and_nothing_leaks(fake, failing, result):
    driver = FakedCudaDriver(SIZE, fake)
    fake.fail(after=failing, result=result)
    out_of_memory = result == RESULT.CUDA_ERROR_OUT_OF_MEMORY
    with pytest.raises(OutOfPhysicalMemory if out_of_memory else DriverError, match=result.name):
        life(driver)
    assert not fake.armed
    assert driver.mapped_bytes == fake.mapped_bytes
    assert driver.mapped_bytes + driver.pooled_bytes == driver.counted_bytes() == fake.created_bytes
    assert all(mapping.accessible for mapping in fake.mapped.values())
    life(driver)  # what failed left nothing in the way
    driver.close()
    assert fake.nothing_left


def test_no_call_of_a_life_is_left_out(driver, fake):
    life(driver)
    assert len(fake.calls) == NUM_CALLS


@pytest.mark.parametrize("function", ["cuMemMap", "cuMemSetAccess"])
def test_a_map_that_fails_half_way_is_undone_in_one_call(driver, fake, function):
    base, handles = driver.reserve(4 * SIZE), driver.create(4)
    driver.map(base, 0, handles[:1])
    before = fake.state
    fake.calls.clear()
    fake.fail(function, after=2 if function == "cuMemMap" else 0)
    with pytest.raises(DriverError, match=f"{function} failed: CUDA_ERROR_UNKNOWN"):
        driver.map(base, SIZE, handles[1:])
    assert fake.state == before
    done = 2 if function == "cuMemMap" else 3
    assert fake.calls[-1] == ("cuMemUnmap", base + SIZE, done * SIZE)
    driver.map(base, SIZE, handles[1:])


def test_a_map_whose_first_call_fails_has_nothing_to_undo(driver, fake):
    base, handles = driver.reserve(SIZE), driver.create(1)
    fake.fail("cuMemMap")
    with pytest.raises(DriverError):
        driver.map(base, 0, handles)
    assert "cuMemUnmap" not in fake.names


def test_running_out_of_memory_gives_back_what_was_had(driver, fake):
    fake.total_bytes = 5 * SIZE
    handles = driver.create(3)
    with pytest.raises(OutOfPhysicalMemory, match=r"create: .*CUDA_ERROR_OUT_OF_MEMORY; 0 bytes of the GPU's 10MB"):
        driver.create(3)
    assert fake.created_bytes == driver.counted_bytes() == driver.pooled_bytes == 3 * SIZE
    assert len(driver.create(2)) == 2
    driver.release(handles)
    assert len(driver.create(3)) == 3


def test_what_cannot_be_undone_is_counted_and_given_back_at_the_end(fake):
    driver = FakedCudaDriver(SIZE, fake)
    fake.fail("cuMemCreate", after=2)
    fake.fail("cuMemRelease")
    with pytest.raises(DriverError, match="cuMemRelease failed"):
        driver.create(3)
    assert driver.counted_bytes() == fake.created_bytes > 0
    driver.create(3)
    driver.close()
    assert fake.nothing_left


def test_a_release_that_fails_keeps_what_is_not_released_yet(driver, fake):
    handles = driver.create(4)
    fake.fail("cuMemRelease", after=2)
    with pytest.raises(DriverError, match="cuMemRelease"):
        driver.release(handles)
    assert driver.pooled_bytes == driver.counted_bytes() == fake.created_bytes == 2 * SIZE
    with pytest.raises(ValueError, match="does not exist"):
        driver.release(handles[:1])
    driver.release(handles[2:])
    assert fake.created_bytes == 0


def test_closing_says_what_failed_first_and_tries_it_again_after_the_rest(fake):
    driver = FakedCudaDriver(SIZE, fake)
    base, other = driver.reserve(SIZE), driver.reserve(SIZE)
    [handle, spare] = driver.create(2)
    driver.map(base, 0, [handle])
    driver.map(other, 0, [spare])
    fake.fail("cuMemUnmap")
    with pytest.raises(DriverError, match=r"2 calls.*cuMemUnmap.*CUDA_ERROR_UNKNOWN"):
        driver.close()  # the unmap, and so the free of that range
    assert fake.nothing_left
    driver.close()


# ---- random programs -------------------------------------------------------------------------------------------


class Program(RuleBasedStateMachine):
    """Any calls, any of which may fail: after each, the books are the driver's, and nothing is inaccessible."""

    @initialize()
    def start(self) -> None:
        self.fake = FakeCuda(granularity=4 * KB)
        self.size = 4 * KB
        self.driver = FakedCudaDriver(self.size, self.fake)
        self.bases = [self.driver.reserve(6 * self.size) for _ in range(2)]

    @rule(after=st.integers(0, 6), result=st.sampled_from([RESULT.CUDA_ERROR_UNKNOWN, RESULT.CUDA_ERROR_OUT_OF_MEMORY]))
    def arm(self, after: int, result: object) -> None:
        self.fake.fail(after=after, result=result)

    @rule(count=st.integers(1, 12))
    def create(self, count: int) -> None:
        self.attempt(self.driver.create, count)

    @rule(which=st.integers(0, 1), slot=st.integers(0, 5), picks=st.lists(st.integers(0, 30), min_size=1, max_size=4))
    def map(self, which: int, slot: int, picks: list[int]) -> None:
        handles = list(self.driver._handles)
        if handles:
            chosen = [handles[i % len(handles)] for i in picks]
            self.attempt(self.driver.map, self.bases[which], slot * self.size, chosen)

    @rule(which=st.integers(0, 1), slot=st.integers(0, 5), count=st.integers(1, 3))
    def unmap(self, which: int, slot: int, count: int) -> None:
        self.attempt(self.driver.unmap, self.bases[which], slot * self.size, count)

    @precondition(lambda self: self.driver._handles)
    @rule(picks=st.sets(st.integers(0, 30), min_size=1, max_size=4))
    def release(self, picks: set[int]) -> None:
        handles = list(self.driver._handles)
        self.attempt(self.driver.release, sorted({handles[i % len(handles)] for i in picks}))

    def attempt(self, call, *arguments) -> None:
        with contextlib.suppress(ValueError, DriverError, OutOfPhysicalMemory):
            call(*arguments)

    @invariant()
    def the_books_are_the_drivers(self) -> None:
        if not hasattr(self, "driver"):
            return
        assert self.driver.mapped_bytes == self.fake.mapped_bytes
        created = self.driver.mapped_bytes + self.driver.pooled_bytes
        assert created == self.driver.counted_bytes() == self.fake.created_bytes
        ours = {base + slot * self.size for base in self.bases for slot in self.driver._ranges[base].handles}
        assert ours == set(self.fake.mapped)
        assert all(mapping.accessible for mapping in self.fake.mapped.values())

    def teardown(self) -> None:
        if hasattr(self, "driver"):
            self.fake._failures.clear()
            self.driver.close()
            assert self.fake.nothing_left


TestProgram = Program.TestCase
TestProgram.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
