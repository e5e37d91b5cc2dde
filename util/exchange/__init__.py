"""导入与导出：NetCDF、Zarr、GRIB ⇄ 目录树、存档。"""
