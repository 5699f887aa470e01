"""Uploads are cut off in the middle: no half file is ever taken for a result."""

from __future__ import annotations

from tests.fault import test_store_errors
from tests.fault.system import Lab


async def campaign(lab: Lab, *, jobs: int) -> str:
    # What has no body is dropped with its answer instead, so this is every second call of any kind.
    return await test_store_errors.campaign(lab, jobs=jobs, share=0.5, ways=("truncated",))


async def test_an_upload_that_is_cut_off_is_made_good(lab: Lab) -> None:
    await campaign(lab, jobs=4)
