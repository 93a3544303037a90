"""Every coded concept that a result carries, once, each with its source.

Codes of the standard come from PS3.16 (DCM: Annex D), SNOMED CT, LOINC and UCUM. What no public scheme names has a
code of our own scheme 99REMNANT, which is identified by a UID of its own in every object that uses it (PS3.3 C.12.1). A
code of ours is never used again for another meaning. A site may put a code of its own in the place of one of ours.
"""

from collections.abc import Mapping

from pydicom.sr.coding import Code

from pipeline.finding import FocusSite

PRIVATE_SCHEME = "99REMNANT"
PRIVATE_SCHEME_UID = "2.25.288864358154193865665367022938750465850"
"""Drawn once at random; identifies the scheme for ever."""

# Our own concepts.
RESIDUAL_TISSUE = Code("RMN001", PRIVATE_SCHEME, "Residual thyroid tissue after thyroidectomy")
PROBABILITY = Code("RMN002", PRIVATE_SCHEME, "Probability of residual thyroid tissue")
RATIO = Code("RMN003", PRIVATE_SCHEME, "Remnant to background ratio")
UPTAKE = Code("RMN004", PRIVATE_SCHEME, "Uptake in thyroid bed")
NOT_ANALYSED_BECAUSE = Code("RMN005", PRIVATE_SCHEME, "Reason for not analysing")
ANALYSED_REGION = Code("RMN006", PRIVATE_SCHEME, "Region analysed for residual thyroid tissue")
ANALYSIS = Code("RMN007", PRIVATE_SCHEME, "Analysis for residual thyroid tissue by artificial intelligence")
NO_RESULT = Code("RMN008", PRIVATE_SCHEME, "No result: scan not analysed for residual thyroid tissue")
FOCI = Code("RMN009", PRIVATE_SCHEME, "Number of foci of uptake")
FOCUS_COUNTS = Code("RMN010", PRIVATE_SCHEME, "Counts of focus above its surroundings")
FOCUS_AREA = Code("RMN011", PRIVATE_SCHEME, "Area of focus at half its height")
FOCUS = Code("RMN012", PRIVATE_SCHEME, "Focus of uptake")
SITES: Mapping[FocusSite, Code] = {
    "bed_left": Code("RMN020", PRIVATE_SCHEME, "Thyroid bed, left"),
    "bed_right": Code("RMN021", PRIVATE_SCHEME, "Thyroid bed, right"),
    "bed_midline": Code("RMN022", PRIVATE_SCHEME, "Thyroid bed, midline"),
    "above_bed": Code("RMN023", PRIVATE_SCHEME, "Midline above thyroid bed"),
    "below_bed": Code("RMN024", PRIVATE_SCHEME, "Midline below thyroid bed"),
    "lateral_left": Code("RMN025", PRIVATE_SCHEME, "Side of neck, left of thyroid bed"),
    "lateral_right": Code("RMN026", PRIVATE_SCHEME, "Side of neck, right of thyroid bed"),
    "salivary_left": Code("RMN027", PRIVATE_SCHEME, "Region of salivary glands, left"),
    "salivary_right": Code("RMN028", PRIVATE_SCHEME, "Region of salivary glands, right"),
    "mouth_or_nose": Code("RMN029", PRIVATE_SCHEME, "Region of mouth and nose"),
    "elsewhere": Code("RMN030", PRIVATE_SCHEME, "Elsewhere in field of view"),
}
"""Where a focus lies against the bed, by distances in the picture. No structure was recognised: no anatomical code."""
OURS = (
    RESIDUAL_TISSUE,
    PROBABILITY,
    RATIO,
    UPTAKE,
    NOT_ANALYSED_BECAUSE,
    ANALYSED_REGION,
    ANALYSIS,
    NO_RESULT,
    FOCI,
    FOCUS_COUNTS,
    FOCUS_AREA,
    FOCUS,
    *SITES.values(),
)

# Verdicts: CID 240 "Present-Absent".
VERDICTS: Mapping[str, Code] = {
    "present": Code("52101004", "SCT", "Present"),
    "absent": Code("272519000", "SCT", "Absent"),
    "undetermined": Code("373068000", "SCT", "Undetermined"),
}

# A scan that was not analysed: CID 6047 "CAD Processing and Findings Summary". The other codes of that group
# (111241 to 111244) say that something succeeded, 111241 even that nothing was found: never written here.
SUMMARY = Code("111017", "DCM", "CAD Processing and Findings Summary")
NONE_SUCCEEDED = Code("111245", "DCM", "No algorithms succeeded; without findings")
SUCCEEDED = frozenset({"111241", "111242", "111243", "111244"})

# The tree of TID 1500 "Measurement Report" and what it includes.
TITLE = Code("126000", "DCM", "Imaging Measurement Report")  # CID 7021
IMAGING_MEASUREMENTS = Code("126010", "DCM", "Imaging Measurements")
QUALITATIVE_EVALUATIONS = Code("C0034375", "UMLS", "Qualitative Evaluations")  # TID 1500, beside the measurements
IMAGE_LIBRARY = Code("111028", "DCM", "Image Library")  # TID 1600
IMAGE_LIBRARY_GROUP = Code("126200", "DCM", "Image Library Group")
SOURCE = Code("260753009", "SCT", "Source")
MODALITY = Code("121139", "DCM", "Modality")  # TID 1602
NUCLEAR_MEDICINE = Code("NM", "DCM", "Nuclear Medicine")  # CID 29
PIXEL_ROWS = Code("110910", "DCM", "Pixel Data Rows")
PIXEL_COLUMNS = Code("110911", "DCM", "Pixel Data Columns")
COMMENT = Code("121106", "DCM", "Comment")
PROCEDURE = Code("49118-3", "LN", "NM unspecified body region")  # CID 100
DEVICE = Code("121007", "DCM", "Device")  # CID 270
TISSUE = Code("85756007", "SCT", "Tissue")  # CID 7150
THYROID = Code("69748006", "SCT", "Thyroid")
AREA = Code("42798000", "SCT", "Area")
MAXIMUM = Code("56851009", "SCT", "Maximum")
FAMILY = Code("123110", "DCM", "Artificial Intelligence")  # CID 7162
CLUSTERING = Code("123107", "DCM", "Cluster Analysis")  # of the outline: GrabCut clusters grey levels

# Names of TID 4019 "Algorithm Identification" and of the measurement group, for the checks that read a result back.
ALGORITHM_NAME = Code("111001", "DCM", "Algorithm Name")
ALGORITHM_VERSION = Code("111003", "DCM", "Algorithm Version")
MEASUREMENT_GROUP = Code("125007", "DCM", "Measurement Group")
TRACKING_IDENTIFIER = Code("112039", "DCM", "Tracking Identifier")
TRACKING_UID = Code("112040", "DCM", "Tracking Unique Identifier")
IMAGE_REGION = Code("111030", "DCM", "Image Region")
FINDING_SITE = Code("363698007", "SCT", "Finding Site")
PROCEDURE_REPORTED = Code("121058", "DCM", "Procedure reported")

# Units: UCUM.
PER_CENT = Code("%", "UCUM", "percent")
SQUARE_MILLIMETRE = Code("mm2", "UCUM", "square millimeter")
COUNTS = Code("{counts}", "UCUM", "Counts")
NO_UNITS = Code("1", "UCUM", "no units")
PIXELS = Code("{pixels}", "UCUM", "Pixels")

# Attributes outside of the tree.
PROCESSING_EQUIPMENT = Code("109102", "DCM", "Processing Equipment")  # CID 7005
SOURCE_IMAGE = Code("121322", "DCM", "Source image for image processing operation")  # CID 7202
SPATIAL_RESAMPLING = Code("113085", "DCM", "Spatial resampling")  # CID 7203


def chosen(code: Code, site_codes: Mapping[str, tuple[str, str, str]]) -> Code:
    """Return the site's own code for one of ours, given as (value, scheme, meaning), else ours."""
    mapped = site_codes.get(code.value) if code.scheme_designator == PRIVATE_SCHEME else None
    return Code(*mapped) if mapped else code
