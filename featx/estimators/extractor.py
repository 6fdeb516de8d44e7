"""PretrainedFeatureExtractor: a pretrained network as a scikit-learn transformer."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing
from numbers import Integral
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from joblib import cpu_count
from sklearn.base import TransformerMixin, _fit_context
from sklearn.utils._param_validation import Interval
from sklearn.utils.validation import _check_feature_names_in

from featx.activations import remembered
from featx.estimators.base import NetworkEstimator
from featx.images.sources import MAX_PIXELS, Items
from featx.store import FeatureStore
from featx.system.compat import with_callbacks
from featx.system.lazy import LazyTransformMixin, is_lazy, note_columns
from featx.system.output import check_has_columns
from featx.system.threads import n_threads

if TYPE_CHECKING:
    from featx.activations.extraction import Extraction
    from featx.activations.plan import FeaturePlan
    from featx.backbones.layers import Architecture


class PretrainedFeatureExtractor(LazyTransformMixin, TransformerMixin, NetworkEstimator):  # type: ignore[misc]
    """Features of images from the layers of a pretrained network.

    Stateless: the features of an image depend on the image and on the parameters alone, so ``transform`` works
    without ``fit``, and ``fit`` checks its arguments but decodes no image and loads no weights. The network runs in
    eval mode, without gradients, up to the deepest layer asked for; it is loaded once per process, shared by all
    clones, and never pickled unless ``backbone`` is itself a module.

    Parameters
    ----------
    backbone : str, callable or nn.Module, default="resnet18"
        A name from :func:`featx.list_backbones` (``"featx_micro"`` works offline); ``"timm/NAME"`` for any name of
        ``timm.list_models()``, with or without a tag (``"timm/resnet18.a1_in1k"``), where timm is installed; a callable
        without arguments that returns a module (cheap to clone and pickle; called once per process, so it must return
        the same network every time); or a module (copied by ``clone`` and by pickling, and copied again by each
        ``transform``, so that the one passed in is never touched). Forward hooks of a module belong to it and run.
        The stages of timm's networks are those of timm's ``feature_info``, the last for each reduction. A module makes
        every pickle as large as it is, takes the estimator out of reach of skops, and lets scikit-learn's
        ``Pipeline(memory=)`` write it anew with each call and find nothing again; with a name or callable none of it
        is so, and ``cache`` keeps features in any case.
    weights : str, path, (path, str) or None, default="DEFAULT"
        Name of published weights (``"DEFAULT"``, ``"IMAGENET1K_V1"``; for timm a tag such as ``"a1_in1k"``), fetched
        once and kept by torch, or for timm by the Hugging Face hub; the path of a file of tensors; or None for a random
        network. For a module or callable ``"DEFAULT"`` means as it comes.

        The content of a file decides how it is read, not its name: safetensors, or what ``torch.save`` wrote. Nothing
        in it is executed, and classes that it names are not imported. The network's tensors are found under whatever
        keys and prefixes they stand (``{"state_dict": ...}``, ``"module."``, ``"backbone."``), and ``verbose=1`` says
        under which. All of the trunk must be there; output layers may be absent, of another size or of another name,
        and then only the layers behind them cannot be read. Where several networks fit that have different tensors (a
        model and its average), it is an error that lists them; ``("last.ckpt", "state_dict_ema")`` chooses: a path, and
        a key of the file's content with dots for what lies deeper.
    layers : str, int or list of these, default="penultimate"
        What to read: ``"penultimate"`` (the input of the output layer), a stage index (negative from the end), a
        module's qualified name as PyTorch prints it (``"NAME#2"`` for its second call), a list of these (columns in
        that order), or ``"all"`` for every stage. See :func:`featx.list_layers`.
    pooling : {"avg", "max", "gem", "cls", "flatten", "map", "auto"} or list of str, default="avg"
        How a spatial or token layer becomes a row; vectors, such as the penultimate layer of most networks, pass
        unchanged. ``"gem"`` is the generalised mean with p = 3 [1]_, ``"cls"`` the class token, ``"flatten"`` all of it
        (large), ``"map"`` gives an array (n, height, width, channels), several layers brought to the first one's grid.
        A list of avg, max, gem and cls, such as ``["cls", "avg"]``, puts them side by side, layer by layer, each
        normalised alone. ``"auto"`` is what those who published the network use: class token and average for DINOv2
        (of ``layers="norm"``), timm's ``global_pool``, else the class token, or the average where there is none. avg,
        max, gem and map leave out class and register tokens, whose number the network tells (timm's
        ``num_prefix_tokens``, parameters called ``cls_token``, ``register_tokens``, ...). Where nothing tells, set
        ``num_prefix_tokens`` on the module; tokens behind those of the image are kept by ``"flatten"`` alone, and
        otherwise refused.
    grid : int, default=1
        avg, max and gem are taken over ``grid`` x ``grid`` cells, which keeps ``grid ** 2`` times as many columns and
        some of the layout of the image. Cells repeat where a layer has fewer.
    normalize : {None, "l2", "signed-sqrt"}, default=None
        Scale each image's row to length 1, per layer, before layers are put side by side; ``"signed-sqrt"`` takes
        signed square roots first [2]_.
    image_shape : tuple or None, default=None
        For a 2-D X with one flattened image a row: (height, width) or (height, width, channels), in pixels, -1 once as
        in numpy. Rows are stretched to the network's input, never cropped.
    pixel_range : "auto" or (low, high), default="auto"
        Meaning of numbers in arrays and in files of more than 8 bits a sample; other files, and Pillow images of
        colours, have 8 bits and their own. ``"auto"`` takes 8 bits as 0..255, floats as 0..1 and the 16 bits of a file
        as 0..65535, raises for anything else, and warns, once a call and with their number, of files that use less than
        an eighth of that, as those of cameras with 10 or 12 bits do; a pair, such as ``(0, 4095)``, is an affine map
        onto 0..1, without clipping. Values beyond it by more than a hundredth of its width raise nothing and are told
        by one such warning, but those of a 2-D X (``image_shape``). Files of 8 bits have the same features under each.
    fourth_band : {"alpha", "ignore"}, default="alpha"
        What a fourth band beside three colours is, in files and arrays: ``"alpha"`` lays the picture over white by it;
        ``"ignore"`` leaves it out, such as near infrared that a TIFF calls alpha.
    preprocess : "weights", str, None or callable, default="weights"
        ``"weights"``: what the weights were trained with; for a path or None that of the network's ``IMAGENET1K_V1``
        (with timm, of its tag or default tag). For a module or callable what the network carries (timm's
        ``pretrained_cfg``) or has beside its weights (the ``preprocessor_config.json`` of a transformers network, where
        it is on this machine; otherwise a warning), and for others torchvision's usual one (short side 256, crop 224,
        ImageNet statistics). Or the full name of other weights (``"ResNet50_Weights.IMAGENET1K_V2"``,
        ``"timm/resnet18.a1_in1k"``); None: X holds ready float tensors; or a callable that gets a PIL image
        (a float tensor of shape (3, height, width), black at 0 and white at 1, for a float array or a file of more than
        8 bits a sample) and returns a tensor. Other forms make features that the network was not trained for.
    image_size : int or None, default=None
        Side in pixels fed to the network; the preset's resize and crop are scaled together. Larger is slower by the
        square and sees finer detail. A named network that takes one size only (ViT, Swin) is built for this one, with
        position embeddings resampled by timm or torchvision, as far as they do it.
    decode : {"exact", "fast"}, default="exact"
        ``"fast"`` reads a JPEG file (or ``bytes``) at the smallest of its built-in scales 1, 1/2, 1/4 and 1/8 that is
        not below what the preprocessing resizes to. Photos of 12 megapixels then take a fraction of the time, and their
        features move by about 4e-2 of their norm. Without effect on small photos and other formats, and where
        ``preprocess`` is a callable or None.
    max_pixels : int, default=178956970
        An image with more is an error before it is decoded. Formats other than JPEG, PNG, GIF, WebP and TIFF are bound
        by ``PIL.Image.MAX_IMAGE_PIXELS`` as well.
    on_error : {"raise", "nan"}, default="raise"
        An unreadable image raises an error that names its row and file, or becomes a row of NaN with one warning
        that counts them; most estimators refuse NaN. :func:`featx.find_unreadable` lists such rows beforehand. Likewise
        an image whose features are not finite (float16 overflows, NaN in weights): its error names layer and cause.
    storage_options : dict or None, default=None
        Lets paths be URLs (``s3://``, ``https://``, ...), opened through fsspec with these options, such as
        ``{"anon": True}``; ``{}`` for none. A URL is read anew in every call. Credentials are better left to the
        environment: parameters are printed, pickled and logged. None opens no connection, whatever X says.
    views : {"flip"} or None, default=None
        ``"flip"`` averages the features of each image and of its mirror image, each a row of its own in the store.
        Twice the passes; not for ``pooling="map"``.
    device : str or None, default=None
        As torch spells it; None takes CUDA, MPS or CPU, the first there is.
    precision : {"float32", "bfloat16", "float16"}, default="float32"
        Of the network; features are float32 in any case. Half precision changes them by about 1e-2 of their norm.
        float16 ends at 65504, which not every network keeps to: bfloat16 has no such end.
    engine : {"auto", "torch", "onnx"}, default="auto"
        What computes a network on a CPU in float32: torch, or onnxruntime, which takes a fifth to nine tenths of the
        time, and for which the network is exported once (seconds, and torch 2.9 or later; ``pip install
        "featx[onnx]"``). ``"auto"`` takes onnxruntime where the images to be computed are many enough to repay the
        export, or where a ``cache`` has it already, and torch otherwise, as for other devices and precisions and for
        networks with code from outside of torch, torchvision and timm, of which ``verbose=1`` tells. An exported
        network is used only if its rows agree with torch's. Which engine it is changes features by less than 1e-5 of
        their norm, and engines share a ``cache``; without one, a named engine gives the same bits on one machine.
    batch_size : int, default=32
        Images decoded and computed together; on a CPU they pass through the network in smaller pieces where that is
        faster. Changes speed and memory, never a result.
    n_jobs : int or None, default=None
        Decoding threads; None means as many as torch uses, -1 all cores. Changes speed, never a result. In a child
        that was forked when torch was loaded (a server that loads before it forks, joblib's ``multiprocessing``
        backend) featx computes on one thread, since torch's others do not survive a fork; load featx after the fork,
        or spawn, for more.
    cache : None, True, str, path or FeatureStore, default=None
        Where features are kept, so that an image passes through the network once, however often and by however many
        processes it is asked for. True means the user's cache folder (or ``$FEATX_CACHE``), a path a folder on a local
        disk. ``preprocess`` must be a preset, None, or a callable with a ``cache_key`` that changes when it does;
        otherwise nothing is kept, and a warning says so. Never changes a result. See :class:`featx.FeatureStore`.
    random_state : int or None, default=None
        Seed of the random network of ``weights=None``; None means 0.
    verbose : int, default=0
        1 shows a progress bar with images per second.

    Attributes
    ----------
    n_features_in_ : int
        Number of columns of a 2-D X. Only with ``image_shape``.
    feature_names_in_ : ndarray of str
        Column names of a 2-D X. Only with ``image_shape`` and a data frame.

    Notes
    -----
    With scikit-learn 1.7 or later, notebooks show the network's stages below the parameters.

    Once features are known, the fits of a search take its time, and a logistic regression is several times as fast on
    one thread of BLAS as on more: search with ``n_jobs=-1``, whose workers have one thread each, or fit within
    ``threadpoolctl.threadpool_limits(1, user_api="blas")`` (``benchmarks/bench_fits.py``).

    See Also
    --------
    featx.list_backbones : Names that ``backbone`` takes.
    featx.list_layers : Names that ``layers`` takes.
    featx.FeatureStore : Where features are kept.
    featx.load_image_folder : Paths and labels from a folder of class subfolders.
    featx.find_unreadable : Rows that cannot be read, with reasons.

    References
    ----------
    .. [1] F. Radenovic et al., "Fine-tuning CNN Image Retrieval with No Human Annotation", TPAMI 2019, section 3.2.
    .. [2] F. Perronnin et al., "Improving the Fisher Kernel for Large-Scale Image Classification", ECCV 2010,
       section 3.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sklearn.linear_model import LogisticRegression
    >>> from sklearn.pipeline import make_pipeline
    >>> from featx import PretrainedFeatureExtractor
    >>> digits = load_digits()
    >>> extractor = PretrainedFeatureExtractor("featx_micro", layers=2, image_shape=(8, 8), pixel_range=(0, 16))
    >>> model = make_pipeline(extractor, LogisticRegression(max_iter=1000))
    >>> model.fit(digits.data[:100], digits.target[:100]).predict(digits.data[100:103]).shape
    (3,)
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **NetworkEstimator._parameter_constraints,
        "random_state": [Interval(Integral, 0, 2**32 - 1, closed="both"), None],
    }

    def __init__(
        self,
        backbone: Any = "resnet18",
        *,
        weights: str | os.PathLike[str] | tuple[str | os.PathLike[str], str] | None = "DEFAULT",
        layers: Any = "penultimate",
        pooling: str | list[str] = "avg",
        grid: int = 1,
        normalize: str | None = None,
        image_shape: tuple[int, ...] | None = None,
        pixel_range: str | tuple[float, float] = "auto",
        fourth_band: str = "alpha",
        preprocess: str | Callable[[Any], Any] | None = "weights",
        image_size: int | None = None,
        decode: str = "exact",
        max_pixels: int = MAX_PIXELS,
        on_error: str = "raise",
        storage_options: dict[str, Any] | None = None,
        views: str | None = None,
        device: str | None = None,
        precision: str = "float32",
        engine: str = "auto",
        batch_size: int = 32,
        n_jobs: int | None = None,
        cache: bool | str | os.PathLike[str] | FeatureStore | None = None,
        random_state: int | None = None,
        verbose: int = 0,
    ) -> None:
        self.backbone = backbone
        self.weights = weights
        self.layers = layers
        self.pooling = pooling
        self.grid = grid
        self.normalize = normalize
        self.image_shape = image_shape
        self.pixel_range = pixel_range
        self.fourth_band = fourth_band
        self.preprocess = preprocess
        self.image_size = image_size
        self.decode = decode
        self.max_pixels = max_pixels
        self.on_error = on_error
        self.storage_options = storage_options
        self.views = views
        self.device = device
        self.precision = precision
        self.engine = engine
        self.batch_size = batch_size
        self.n_jobs = n_jobs
        self.cache = cache
        self.random_state = random_state
        self.verbose = verbose

    @with_callbacks  # type: ignore[untyped-decorator]
    @_fit_context(prefer_skip_nested_validation=True)  # type: ignore[untyped-decorator]
    def fit(self, X: Any, y: Any = None) -> PretrainedFeatureExtractor:
        """Check parameters and the form of X; decode no image and load no weights.

        Parameters
        ----------
        X : array-like of images
            As in :meth:`transform`.
        y : None
            Ignored.

        Returns
        -------
        self
        """
        context = self._init_callback_context()
        context.call_on_fit_task_begin(estimator=self, X=X, y=y)
        if is_lazy(X):  # its parts are looked at when they are there
            note_columns(self, X)
        else:
            self._items(X, reset=True, in_full=True)  # at what scale they are to be decoded is for later
        if not self._went_well_before():
            self._check_network()
        context.call_on_fit_task_end(estimator=self, X=X, y=y, reconstruction_attributes=dict)
        return self

    def transform(self, X: Any) -> np.ndarray:
        """Features of images, one row each, in the order of X.

        Parameters
        ----------
        X : array-like of n images
            A list, array, Series or one-column frame of paths, ``bytes``, open files, PIL images, or dicts of the form
            ``{"bytes": ..., "path": ...}`` that Hugging Face's datasets have; an array of shape (n, height, width) or
            (n, height, width, channels) with 1, 3 or 4 channels; a tensor of shape (n, channels, height, width); or,
            with ``image_shape``, 2-D numbers with one flattened image a row. A Dask array, Series or frame of these
            gives a Dask collection, of which nothing is computed yet: an array, or a frame after
            ``set_output(transform="pandas")``.

        Returns
        -------
        features : ndarray of shape (n, n_features), float32
            Of shape (n, height, width, channels) for ``pooling="map"``.

        Raises
        ------
        ImageError
            An image cannot be read and ``on_error="raise"``. A ValueError; names the row and the file.
        NotFinite
            Likewise where the network makes NaN or infinity of an image. An ImageError; names the layer and the cause.
        ValueError
            X is of no form that is known, or a parameter is wrong.
        """
        self._validate_params()
        check_has_columns(self)
        store = remembered.store_of(self)
        question = remembered.question_of(self, store, make=True)
        known, items = self._known_rows(X, store, question)
        if known is not None:
            return known
        extraction = self._extraction(items)
        features = np.empty((len(extraction.items), *extraction.recipe.plan.shape), dtype=np.float32)
        with closing(extraction.iter_blocks()) as blocks:
            for block in blocks:
                features[block.start : block.stop] = block.rows
        remembered.remember(question, self, extraction)
        return features

    def warm(self, X: Any, layers: Any = None) -> PretrainedFeatureExtractor:
        """Fill the cache in one pass, so that later calls find everything in it.

        Parameters
        ----------
        X : array-like of n images
            As in :meth:`transform`.
        layers : str, int, list of these or None, default=None
            More layers to keep, as the parameter ``layers`` takes them, each in all poolings of one row. None keeps
            what the store's ``keep`` says, and what this estimator is set to.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            ``cache`` is None, or something is wrong as in :meth:`transform`.
        """
        self._extraction_of_images(X).warm([layers] if isinstance(layers, (str, Integral)) else layers)
        return self

    def iter_transform(self, X: Any) -> Iterator[np.ndarray]:
        """Features of images in blocks of rows, for data larger than memory.

        Parameters
        ----------
        X : array-like of n images
            As in :meth:`transform`.

        Yields
        ------
        rows : ndarray of shape (at most batch_size, n_features), float32
            In the order of X. Decoding stops when the iterator is closed.
        """
        return self._extraction_of_images(X).iter_rows()

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """Names of the columns: layer, pooling and position, such as ``"layer4_avg_17"``.

        Parameters
        ----------
        input_features : array-like of str or None, default=None
            Only checked against ``feature_names_in_``, where there is one.

        Returns
        -------
        names : ndarray of str objects
        """
        self._validate_params()
        if hasattr(self, "n_features_in_"):
            _check_feature_names_in(self, input_features)
        if self.pooling == "map":
            raise ValueError('Column names need one row per image, got pooling="map". Use any other pooling.')
        if self.pooling == "flatten" and self.image_size is None and not isinstance(self.preprocess, str):
            raise ValueError(
                'Column names of pooling="flatten" depend on the size of the images, which preprocess decides. Set '
                "image_size to it."
            )
        return self._plan(self._architecture(self._spec())).names()

    def _check_network(self) -> None:
        """Raise what is wrong with the parameters that choose a network, a device and layers; load no weights."""
        from featx.activations.passes import check_engine
        from featx.system.devices import resolve_device

        spec = self._spec()
        if spec.backbone.named or self.preprocess != "weights":  # a callable is not called for its network's own
            self._preprocessing(spec)
        check_engine(self.engine, resolve_device(self.device), self.precision)
        if spec.backbone.named:
            self._plan(self._architecture(spec))

    def _went_well_before(self) -> bool:
        """Whether another process found nothing wrong with these parameters, and torch can be left alone."""
        if not remembered.saves_time():
            return False
        store = remembered.store_of(self)
        return remembered.recall(remembered.question_of(self, store, make=False), store) is not None

    def _known_rows(self, X: Any, store: FeatureStore | None, question: str | None) -> tuple[np.ndarray | None, Items]:
        """All features, where they can be had without loading torch and torchvision; and X as items."""
        answer = remembered.recall(question, store)
        if store is None or answer is None:
            return None, self._items(X, reset=False)
        items = self._items(X, reset=False, in_full=True)
        known = answer.rows(items, store, n_threads(self.n_jobs, cpu_count()))
        if known is None and self.decode != "exact":
            items = items.read_at(self._short_side())
        return known, items

    def _width(self) -> tuple[int, ...]:
        return self._plan(self._architecture(self._spec())).shape

    def _plan(self, architecture: Architecture) -> FeaturePlan:
        from featx.activations.plan import FeaturePlan

        if self.pooling == "map" and self.views is not None:
            raise ValueError(f'Rows without places are expected with views={self.views!r}, got pooling="map". Set one.')
        layers, usual = architecture.resolve(self.layers), architecture.usual_poolings
        return FeaturePlan.of(layers, self.pooling, self.grid, self.normalize, usual)

    def _extraction_of_images(self, X: Any) -> Extraction:
        """What the public methods run; its blocks also tell why an image could not be read."""
        self._validate_params()
        return self._extraction(self._items(X, reset=False))

    def _extraction(self, items: Items, shape: tuple[int, int, int] | None = None) -> Extraction:
        spec = self._spec()
        architecture = self._architecture(spec, items, shape)
        return self._extraction_of(items, spec, architecture, self._plan(architecture), self.views)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.requires_fit = False
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags
