"""Stores at URLs: memory and local file systems, and S3 through its real client against a local server."""

from __future__ import annotations

import threading
import uuid
from pathlib import Path

import pytest
import torch

from onebase.errors import ConfigError, CorruptError, StoreError, UnknownNameError
from onebase.store import Store
from onebase.store.remote import RemoteStore
from test_hub import CONFIG


@pytest.fixture(autouse=True)
def local_part(tmp_path, monkeypatch):
    """Keep what is fetched in the test's own folder."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


@pytest.fixture(params=["memory", "file"])
def url(request, tmp_path) -> str:
    return f"memory://{uuid.uuid4().hex}/a" if request.param == "memory" else f"file://{tmp_path}/there"


def save(store: Store, value: float, name: str = "a"):
    return store.save(name, config=CONFIG, tensors={"x": torch.full((3,), value)})


def elsewhere(store: RemoteStore, folder: Path) -> RemoteStore:
    """Return the same store as another machine sees it: nothing was fetched yet."""
    other = Store(store.url)
    other.root = folder
    return other  # type: ignore[return-value]


def life(url: str, folder: Path) -> None:
    """Save, fetch, promote, roll back, remove and collect."""
    store = Store(url)
    assert isinstance(store, RemoteStore) and store.conditional and "several writers" in store.writers
    assert store.list() == []
    for value in (1.0, 2.0, 3.0):
        save(store, value)
    there = elsewhere(store, folder)
    assert [s.version for s in there.list()] == [1, 2, 3]
    assert float(there.resolve("a@2").tensors()["x"][0]) == 2.0
    assert there.resolve("a").digest == store.resolve("a@3").digest
    store.promote("a@2", "prod")
    there.promote("a@3", "prod")
    assert store.aliases("a") == {"prod": 3} and store.rollback("a", "prod").version == 2
    with pytest.raises(StoreError, match="'prod'"):
        there.remove("a@2")
    there.remove("a@3")
    assert save(store, 4.0).version == 4  # a number is not given twice
    with pytest.raises(UnknownNameError):
        store.resolve("a@3")
    with pytest.raises(ConfigError, match="only in case"):
        save(store, 1.0, "A")
    assert store.gc(older_than=3600).leftovers == ()  # what is young may belong to a running save
    gone = store.gc(older_than=0, apply=True).leftovers
    assert len(gone) == 3 and store.gc(older_than=0).leftovers == ()
    for version in store.list():
        version.verify()


def test_a_remote_store_keeps_what_a_store_keeps(url, tmp_path):
    life(url, tmp_path / "elsewhere")


def test_equal_files_are_one_blob(url):
    store = Store(url)
    for _ in range(3):
        save(store, 1.0)
    assert len(store._entries("blobs")) == 1 + 3 * 2  # one of tensors, a card and a config for each


def test_writers_at_once_lose_nothing(url, tmp_path):
    stores = [elsewhere(Store(url), tmp_path / str(i)) for i in range(6)]
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for i in range(5):
                save(stores[number], number * 10.0 + i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    found = elsewhere(Store(url), tmp_path / "reader").list()
    assert [s.version for s in found] == list(range(1, 31))
    assert {float(s.tensors()["x"][0]) for s in found} == {n * 10.0 + i for n in range(6) for i in range(5)}


def test_aliases_that_changed_meanwhile_are_not_overwritten(url):
    one, two = Store(url), Store(url)
    save(one, 1.0)
    histories = one._histories("a")
    two.promote("a@1", "prod")
    with pytest.raises(StoreError, match="try again"):
        one._put_histories("a", {**histories, "next": [1]})
    assert one.aliases("a") == {"prod": 1}


def test_damage_is_named(url, tmp_path):
    store = Store(url)
    saved = save(store, 1.0)
    blob = store._at("blobs", saved.config.files["adapter_model.safetensors"])
    whole = store.fs.cat_file(blob)
    store.fs.pipe_file(blob, whole[:-1] + b"\7")
    fresh = elsewhere(store, tmp_path / "fresh")
    with pytest.raises(CorruptError, match="holds something else"):
        fresh.resolve("a")
    with pytest.warns(UserWarning, match="left out"):
        assert fresh.list() == []
    store.fs.rm_file(blob)
    with pytest.raises(StoreError, match="cannot fetch"):
        fresh.resolve("a")
    for text in (b"{", b"[]", b'{"digest": "x", "files": {"../x": "' + b"a" * 64 + b'"}}'):
        store.fs.pipe_file(store._at("adapters", "a", "1.json"), text)
        with pytest.raises(CorruptError, match=r"1\.json"):
            fresh.resolve("a")


def test_the_environment_names_a_remote_store(monkeypatch, url):
    monkeypatch.setenv("ONEBASE_HOME", url)
    assert isinstance(Store(), RemoteStore) and Store().url == url.rstrip("/")


def test_unknown_file_systems_say_what_to_install():
    with pytest.raises(ConfigError, match="onebase\\[remote\\]"):
        Store("nosuch://x/y")


def test_where_creation_is_not_conditional_it_is_said(monkeypatch, url):
    monkeypatch.setattr("onebase.store.remote.CONDITIONAL", ())
    store = Store(url.replace("file://", "memory://"))
    assert not store.conditional and "one writer at a time" in store.writers
    assert [save(store, 1.0).version, save(store, 2.0).version] == [1, 2]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the server's and client's own code
def test_s3_through_its_real_client(tmp_path, monkeypatch):
    pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for key, value in {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y", "AWS_DEFAULT_REGION": "us-east-1",
                           "AWS_ENDPOINT_URL": f"http://{host}:{port}",
                           "FSSPEC_S3_ENDPOINT_URL": f"http://{host}:{port}"}.items():  # fmt: skip
            monkeypatch.setenv(key, value)
        import fsspec
        import s3fs

        fsspec.config.conf.setdefault("s3", {})["endpoint_url"] = f"http://{host}:{port}"
        s3fs.S3FileSystem(endpoint_url=f"http://{host}:{port}").mkdir("bucket")
        life("s3://bucket/adapters", tmp_path / "elsewhere")
        store = Store("s3://bucket/adapters")
        store._create(b"1", "x")
        with pytest.raises(FileExistsError):
            store._create(b"2", "x")
        assert store._read("x") == b"1"
    finally:
        server.stop()
