"""scikit-learn's own checks on the real estimator, by name: a green suite of one check would prove little."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.base import BaseEstimator, clone
from sklearn.utils import estimator_checks
from sklearn.utils.estimator_checks import check_estimator, estimator_checks_generator

from featx import FineTuneClassifier, FineTuneRegressor, PretrainedFeatureExtractor, TransferClassifier

NAMES = """
check_estimator_cloneable check_estimator_tags_renamed check_valid_tag_types check_estimator_repr
check_no_attributes_set_in_init check_fit_score_takes_y check_estimators_overwrite_params
check_dont_overwrite_parameters check_estimators_fit_returns_self check_readonly_memmap_input
check_do_not_raise_errors_in_init_or_set_params check_n_features_in_after_fitting check_mixin_order
check_positive_only_tag_during_fit check_estimators_dtypes check_complex_data check_dtype_object
check_estimators_empty_data_messages check_pipeline_consistency check_estimators_nan_inf check_estimator_sparse_tag
check_estimator_sparse_array check_estimator_sparse_matrix check_estimators_pickle check_estimators_pickle
check_array_api_input check_f_contiguous_array_estimator check_transformer_data_not_an_array check_transformer_general
check_transformer_preserve_dtypes check_transformer_general check_transformers_unfitted_stateless
check_transformer_n_iter check_parameters_default_constructible check_methods_sample_order_invariance
check_methods_subset_invariance check_fit2d_1sample check_fit2d_1feature check_get_params_invariance check_set_params
check_dict_unchanged check_fit_idempotent check_fit_check_is_fitted check_n_features_in check_fit1d
check_fit2d_predict1d
""".split()  # noqa: SIM905  a list of 46 lines is no better to read

NEVER_YIELDED = [
    "check_param_validation",
    "check_set_output_transform",
    "check_set_output_transform_pandas",
    "check_set_output_transform_polars",
    "check_global_output_transform_pandas",
    "check_global_set_output_transform_polars",
    "check_transformer_get_feature_names_out",
    "check_transformer_get_feature_names_out_pandas",
    "check_dataframe_column_names_consistency",
]


class Bare(BaseEstimator):
    """An estimator that says nothing of itself."""

    def fit(self, X, y=None):
        return self


def check_names(results: list[dict], newest: list[str]) -> None:
    """Assert that an estimator was given every check of the newest release's list that the installed release has.

    Where it has all of them, it was given those and no others.
    """
    given, of_everyone = (
        [result["check_name"] for result in results],
        {getattr(check, "func", check).__name__ for _, check in estimator_checks_generator(Bare())},
    )
    # In older releases array API checks are for estimators alone that say they support it.
    lacking = {"check_array_api_input"} - of_everyone
    there = [name for name in newest if hasattr(estimator_checks, name) and name not in lacking]
    assert set(there) <= set(given)
    if len(there) == len(newest):
        assert sorted(given) == sorted(newest)


EXTRACTOR = PretrainedFeatureExtractor("featx_micro", image_shape=(1, -1), pixel_range=(-5, 5), image_size=16)


def test_extractor_passes_every_check_of_scikit_learn() -> None:
    results = check_estimator(EXTRACTOR, on_fail=None, on_skip=None)
    check_names(results, NAMES)
    left = {result["check_name"]: result["status"] for result in results if result["status"] != "passed"}
    assert left.pop("check_array_api_input", "skipped") == "skipped"  # as without SCIPY_ARRAY_API
    assert not left


COMMON = {"image_shape": (1, -1), "pixel_range": (-5, 5), "image_size": 16, "batch_size": 16, "epochs": 2}
CLASSIFIERS = {
    "head only": FineTuneClassifier("featx_micro", freeze="all", **COMMON),
    "last stage": FineTuneClassifier("featx_micro", freeze=-1, learning_rate=1e-4, **COMMON | {"epochs": 1}),
}
REGRESSORS = {
    "head only": FineTuneRegressor("featx_micro", freeze="all", **COMMON),
    "last stage": FineTuneRegressor("featx_micro", freeze=-1, learning_rate=1e-4, **COMMON | {"epochs": 1}),
}
# Of every tuned network, and of classifiers and regressors alone.
TUNED_NAMES = """
check_estimator_cloneable check_estimator_tags_renamed check_valid_tag_types check_estimator_repr
check_no_attributes_set_in_init check_fit_score_takes_y check_estimators_overwrite_params
check_dont_overwrite_parameters check_estimators_fit_returns_self check_readonly_memmap_input
check_estimators_unfitted check_do_not_raise_errors_in_init_or_set_params check_n_features_in_after_fitting
check_mixin_order check_positive_only_tag_during_fit check_estimators_dtypes check_sample_weights_pandas_series
check_sample_weights_not_an_array check_sample_weights_list check_all_zero_sample_weights_error
check_sample_weights_shape check_sample_weights_not_overwritten check_sample_weight_equivalence_on_dense_data
check_complex_data check_dtype_object check_estimators_empty_data_messages check_pipeline_consistency
check_estimators_nan_inf check_estimator_sparse_tag check_estimator_sparse_array check_estimator_sparse_matrix
check_estimators_pickle check_estimators_pickle check_array_api_input check_f_contiguous_array_estimator
check_estimators_partial_fit_n_features check_supervised_y_no_nan check_supervised_y_2d
check_non_transformer_estimators_n_iter check_transformer_data_not_an_array check_transformer_general
check_transformer_general check_transformer_preserve_dtypes check_transformers_unfitted check_transformer_n_iter
check_parameters_default_constructible check_methods_sample_order_invariance check_methods_subset_invariance
check_fit2d_1sample check_fit2d_1feature check_get_params_invariance check_set_params check_dict_unchanged
check_fit_idempotent check_fit_check_is_fitted check_n_features_in check_fit1d check_fit2d_predict1d
check_requires_y_none
""".split()  # noqa: SIM905
CLASSIFIER_NAMES = """
check_classifier_data_not_an_array check_classifiers_one_label check_classifiers_one_label_sample_weights
check_classifiers_classes check_classifiers_train check_classifiers_train check_classifiers_train
check_classifiers_regression_target check_classifiers_multilabel_representation_invariance
check_classifiers_multilabel_output_format_predict check_classifiers_multilabel_output_format_predict_proba
check_classifiers_multilabel_output_format_decision_function check_class_weight_classifiers
check_decision_proba_consistency
""".split()  # noqa: SIM905
REGRESSOR_NAMES = """
check_regressors_train check_regressors_train check_regressors_train check_regressor_data_not_an_array
check_regressor_multioutput check_regressors_no_decision_function check_regressors_int
""".split()  # noqa: SIM905


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize(
    ("estimators", "names"),
    [(CLASSIFIERS, CLASSIFIER_NAMES), (REGRESSORS, REGRESSOR_NAMES)],
    ids=["classes", "numbers"],
)
def test_tuned_network_passes_every_check_of_scikit_learn(
    name: str, estimators: dict[str, BaseEstimator], names: list[str]
) -> None:
    # Mini-batches of SGD see an image twice, or not at all, in other company than an image of weight 2 or 0.
    inherent = {"check_sample_weight_equivalence_on_dense_data": "steps on mini-batches depend on who is in them"}
    results = check_estimator(estimators[name], on_fail=None, on_skip=None, expected_failed_checks=inherent)
    check_names(results, TUNED_NAMES + names)
    left = {result["check_name"]: result["status"] for result in results if result["status"] != "passed"}
    assert left.pop("check_array_api_input", "skipped") == "skipped"  # as without SCIPY_ARRAY_API
    assert left == dict.fromkeys(inherent, "xfail")


READING = {"image_shape": (1, -1), "pixel_range": (-5, 5), "image_size": 16, "batch_size": 16}
TRANSFER = {
    "the probe": TransferClassifier("featx_micro", recipes=["probe"], cv=2, **READING),
    "all kinds": TransferClassifier(
        "featx_micro",
        recipes=["probe", "layers", "lda", ("last stage", CLASSIFIERS["last stage"]), "mean"],
        cv=2,
        **READING,
    ),
}
# Checks of what FineTuneClassifier is and this is not.
OF_TRANSFORMERS = [name for name in TUNED_NAMES if "transformer" in name and "non_transformer" not in name]


@pytest.mark.parametrize("name", TRANSFER)
def test_transfer_passes_every_check_that_a_tuned_classifier_passes(name: str) -> None:
    inherent = {
        "check_sample_weight_equivalence_on_dense_data": "weights and repeats differ by the tolerance of float32 fits, "
        "and a trained network as FineTuneClassifier's does"
    }
    results = check_estimator(TRANSFER[name], on_fail=None, on_skip=None, expected_failed_checks=inherent)
    check_names(results, [each for each in TUNED_NAMES + CLASSIFIER_NAMES if each not in OF_TRANSFORMERS])
    left = {result["check_name"]: result["status"] for result in results if result["status"] != "passed"}
    assert left.pop("check_array_api_input", "skipped") == "skipped"  # as without SCIPY_ARRAY_API
    for check in inherent:  # older releases compare less closely
        assert left.pop(check, "xfail") == "xfail"
    assert not left


# Some of these fit on a frame and transform an array on purpose, at which scikit-learn itself warns.
@pytest.mark.filterwarnings("ignore:X .*feature names")
@pytest.mark.parametrize("estimator", [EXTRACTOR, CLASSIFIERS["head only"], REGRESSORS["head only"]])
@pytest.mark.parametrize("name", NEVER_YIELDED)
def test_checks_that_are_never_yielded_pass(name: str, estimator) -> None:
    getattr(estimator_checks, name)(type(estimator).__name__, clone(estimator))


def test_every_pixel_of_a_row_changes_some_feature() -> None:
    rng = np.random.default_rng(0)
    row = rng.uniform(-5, 5, size=20)
    changed = np.repeat(row[None], 21, axis=0)
    changed[np.arange(20), np.arange(20)] += 1
    features = EXTRACTOR.transform(changed)
    distances = np.linalg.norm(features[:20] - features[20], axis=1) / np.linalg.norm(features[20])
    assert (distances > 1e-4).all(), distances


IMAGES = np.random.default_rng(0).integers(0, 256, size=(6, 20, 24, 3), dtype=np.uint8)
ON_IMAGES = PretrainedFeatureExtractor("featx_micro", layers=[1, "penultimate"])


def test_images_in_any_order_and_any_subset_give_the_same_rows() -> None:
    whole, order = ON_IMAGES.transform(IMAGES), np.array([3, 1, 5, 0, 4, 2])
    np.testing.assert_allclose(ON_IMAGES.transform(IMAGES[order]), whole[order], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ON_IMAGES.transform(IMAGES[2:3]), whole[2:3], rtol=1e-4, atol=1e-5)


def test_images_are_left_unmodified_and_may_be_read_only_or_mapped(tmp_path) -> None:
    np.save(tmp_path / "images.npy", IMAGES)
    mapped, before = np.load(tmp_path / "images.npy", mmap_mode="r"), IMAGES.copy()
    read_only = IMAGES.copy()
    read_only.setflags(write=False)
    expected = ON_IMAGES.transform(IMAGES)
    np.testing.assert_array_equal(IMAGES, before)
    for X in (mapped, read_only, np.asfortranarray(IMAGES), IMAGES[::1, ::-1][:, ::-1]):
        np.testing.assert_array_equal(ON_IMAGES.transform(X), expected)


def test_fit_and_transform_on_images_leave_parameters_and_state_alone() -> None:
    extractor = clone(ON_IMAGES)
    before = dict(vars(extractor))
    assert extractor.fit(IMAGES) is extractor
    np.testing.assert_array_equal(extractor.transform(IMAGES), extractor.fit_transform(IMAGES, [0, 1] * 3))
    assert vars(extractor) == before


def test_dtypes_of_images_do_not_change_features() -> None:
    expected = ON_IMAGES.transform(IMAGES)
    floats = IMAGES / 255
    for X in (floats, floats.astype(np.float32), list(IMAGES)):
        # Bytes are resized as bytes, so rounded before the network; what counts is the row, not its smallest entry.
        distances = np.linalg.norm(ON_IMAGES.transform(X) - expected, axis=1)
        assert (distances < 2e-2 * np.linalg.norm(expected, axis=1)).all(), distances


def test_no_images_is_an_error_in_scikit_learns_words() -> None:
    with pytest.raises(ValueError, match=r"0 sample\(s\)"):
        ON_IMAGES.transform(IMAGES[:0])
