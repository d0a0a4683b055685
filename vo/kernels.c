/* Sums over observations for the geometry: what `kernels.py` calls where the package was built with a C compiler.
 *
 * Every function has its counterpart in NumPy, which names the formulas and their sources and is what the tests hold it
 * to: `bundle_equations.py` (window_*), `relative_pose.py` (matches_*), `absolute_pose.py` (landmarks_*). Arrays are
 * C-contiguous, of doubles unless said otherwise; nothing is allocated, no argument may overlap another.
 */
#include <math.h>
#include <stdint.h>

#define STRINGIFIED(text) #text
#define TEXT_OF(macro) STRINGIFIED(macro)
#ifndef SOURCE
#define SOURCE unknown
#endif

/* Wider vector instructions where the processor has them, chosen when the library is loaded. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__gnu_linux__)
#define EXPORTED __attribute__((visibility("default"), target_clones("default", "arch=haswell", "arch=skylake-avx512")))
#else
#define EXPORTED __attribute__((visibility("default")))
#endif
#define INLINE static inline __attribute__((always_inline))

__attribute__((visibility("default"))) const char *lightvo_source(void) { return TEXT_OF(SOURCE); }

/* --- bundle adjustment ------------------------------------------------------------------------------------------- */

#define NEAREST 1e-9
#define LARGEST_SQUARED 1e6
#define MAX_ROWS 3
#define MAX_LENS 2

typedef struct {
    int64_t num_poses, num_fixed, num_points, num_observations, refines_radial, refines_focal;
    const double *poses;            /* (P, 4, 4) */
    const double *points;           /* (L, 3) */
    const double *rays;             /* (O, 2) */
    const int64_t *pose_index;      /* (O,) ascending */
    const int64_t *point_index;     /* (O,) */
    const double *inverse_depths;   /* (O,) or null */
    double focal_px, kappa, log_focal, depth_gain_px, kernel_px;
} Window;

typedef struct {
    double u, v, inverse_depth, ray_x, ray_y, r_squared, residual_x, residual_y;
    int is_before;
} Projection;

INLINE Projection projected(const Window *w, int64_t o, double focal_px, double shrink) {
    const double *T = w->poses + 16 * w->pose_index[o], *X = w->points + 3 * w->point_index[o];
    const double x = X[0] - T[3], y = X[1] - T[7], z = X[2] - T[11];
    const double px = T[0] * x + T[4] * y + T[8] * z, py = T[1] * x + T[5] * y + T[9] * z;
    const double depth = T[2] * x + T[6] * y + T[10] * z;
    Projection p;
    p.is_before = depth > 0;
    p.inverse_depth = 1.0 / (fabs(depth) < NEAREST ? NEAREST : depth);
    p.u = px * p.inverse_depth, p.v = py * p.inverse_depth;
    p.ray_x = w->rays[2 * o] * shrink, p.ray_y = w->rays[2 * o + 1] * shrink;
    p.r_squared = p.ray_x * p.ray_x + p.ray_y * p.ray_y;
    const double corrected = 1.0 - w->kappa * p.r_squared;
    p.residual_x = (p.u - p.ray_x * corrected) * focal_px, p.residual_y = (p.v - p.ray_y * corrected) * focal_px;
    return p;
}

EXPORTED double lightvo_window_cost(const Window *w) {
    const double focal_px = w->focal_px * exp(w->log_focal), shrink = exp(-w->log_focal);
    const double kernel_squared = w->kernel_px * w->kernel_px;
    double cost = 0.0;
    for (int64_t o = 0; o < w->num_observations; o++) {
        const Projection p = projected(w, o, focal_px, shrink);
        const double squared = p.residual_x * p.residual_x + p.residual_y * p.residual_y;
        cost += log1p((p.is_before ? fmin(squared, LARGEST_SQUARED) : LARGEST_SQUARED) / kernel_squared);
        if (w->inverse_depths && p.is_before && isfinite(w->inverse_depths[o])) {
            const double off_px = (p.inverse_depth - w->inverse_depths[o]) * w->depth_gain_px;
            cost += log1p(fmin(off_px * off_px, LARGEST_SQUARED) / kernel_squared);
        }
    }
    return kernel_squared * cost;
}

/* errors (O,) px: lengths of the residuals in the image, infinite behind a camera. */
EXPORTED void lightvo_window_errors(const Window *w, double *restrict errors) {
    const double focal_px = w->focal_px * exp(w->log_focal), shrink = exp(-w->log_focal);
    for (int64_t o = 0; o < w->num_observations; o++) {
        const Projection p = projected(w, o, focal_px, shrink);
        errors[o] = p.is_before ? sqrt(p.residual_x * p.residual_x + p.residual_y * p.residual_y) : INFINITY;
    }
}

/* The derivatives of one observation's residuals, all times the root of their weights; returns how many there are. */
INLINE int weighted_rows(const Window *w, int64_t o, double focal_px, double shrink, double by_pose[MAX_ROWS][6],
                         double by_point[MAX_ROWS][3], double by_lens[MAX_LENS][MAX_ROWS], double residual[MAX_ROWS]) {
    const double *T = w->poses + 16 * w->pose_index[o];
    const Projection p = projected(w, o, focal_px, shrink);
    const double u = p.u, v = p.v, near = p.inverse_depth;
    const double squared = p.residual_x * p.residual_x + p.residual_y * p.residual_y;
    const double root = p.is_before ? 1.0 / sqrt(1.0 + squared / (w->kernel_px * w->kernel_px)) : 0.0;
    const double gain = root * focal_px;
    for (int i = 0; i < 3; i++) {
        by_point[0][i] = (T[4 * i] - u * T[4 * i + 2]) * gain * near;
        by_point[1][i] = (T[4 * i + 1] - v * T[4 * i + 2]) * gain * near;
    }
    const double rows[2][6] = {{-near, 0.0, u * near, u * v, -1.0 - u * u, v},
                               {0.0, -near, v * near, 1.0 + v * v, -u * v, -u}};
    for (int row = 0; row < 2; row++)
        for (int i = 0; i < 6; i++) by_pose[row][i] = rows[row][i] * gain;
    residual[0] = p.residual_x * root, residual[1] = p.residual_y * root;
    int lens = 0;
    if (w->refines_radial) {
        by_lens[lens][0] = p.ray_x * gain * p.r_squared, by_lens[lens][1] = p.ray_y * gain * p.r_squared;
        by_lens[lens++][2] = 0.0;
    }
    if (w->refines_focal) {
        const double turned = 2.0 * w->kappa * p.r_squared;
        by_lens[lens][0] = (u - p.ray_x * turned) * gain, by_lens[lens][1] = (v - p.ray_y * turned) * gain;
        by_lens[lens++][2] = 0.0;
    }
    if (!w->inverse_depths) return 2;
    const int is_used = isfinite(w->inverse_depths[o]) && near > 0;
    const double off_px = is_used ? (near - w->inverse_depths[o]) * w->depth_gain_px : 0.0;
    const double depth_root = 1.0 / sqrt(1.0 + (off_px / w->kernel_px) * (off_px / w->kernel_px));
    const double depth_gain = is_used ? w->depth_gain_px * depth_root : 0.0;
    for (int i = 0; i < 3; i++) by_point[2][i] = -T[4 * i + 2] * depth_gain * near * near;
    const double row[6] = {0.0, 0.0, near * near, v * near, -u * near, 0.0};
    for (int i = 0; i < 6; i++) by_pose[2][i] = row[i] * depth_gain;
    residual[2] = off_px * depth_root;
    return 3;
}

/* Adds to zeroed sums for C = 6 F + lens camera unknowns: cameras (C, C), camera_gradient (C,), points (L, 3, 3),
 * point_gradients (L, 3), lens_points (lens, L, 3); and writes blocks (free observations, 6, 3). */
EXPORTED void lightvo_window_linearize(const Window *w, double *restrict cameras, double *restrict camera_gradient,
                                       double *restrict points, double *restrict point_gradients,
                                       double *restrict blocks, double *restrict lens_points) {
    const double focal_px = w->focal_px * exp(w->log_focal), shrink = exp(-w->log_focal);
    const int64_t first_lens = 6 * (w->num_poses - w->num_fixed);
    const int num_lens = (int)(w->refines_radial + w->refines_focal);
    const int64_t size = first_lens + num_lens;
    double by_pose[MAX_ROWS][6], by_point[MAX_ROWS][3], by_lens[MAX_LENS][MAX_ROWS], residual[MAX_ROWS];
    for (int64_t o = 0; o < w->num_observations; o++) {
        const int num_rows = weighted_rows(w, o, focal_px, shrink, by_pose, by_point, by_lens, residual);
        double *point = points + 9 * w->point_index[o], *point_gradient = point_gradients + 3 * w->point_index[o];
        for (int row = 0; row < num_rows; row++)
            for (int i = 0; i < 3; i++) {
                for (int j = 0; j < 3; j++) point[3 * i + j] += by_point[row][i] * by_point[row][j];
                point_gradient[i] += by_point[row][i] * residual[row];
            }
        for (int lens = 0; lens < num_lens; lens++) {
            double *lens_point = lens_points + 3 * (lens * w->num_points + w->point_index[o]);
            for (int row = 0; row < 2; row++) {
                const double slope = by_lens[lens][row];
                for (int i = 0; i < 3; i++) lens_point[i] += by_point[row][i] * slope;
                camera_gradient[first_lens + lens] += slope * residual[row];
                for (int other = 0; other < num_lens; other++)
                    cameras[(first_lens + lens) * size + first_lens + other] += slope * by_lens[other][row];
            }
        }
        const int64_t pose = w->pose_index[o] - w->num_fixed;
        if (pose < 0) continue;
        double *camera = cameras + 6 * pose * size + 6 * pose, *gradient = camera_gradient + 6 * pose;
        for (int i = 0; i < 6; i++) {
            double products[6] = {0}, shared[3] = {0}, sum = 0.0;
            for (int row = 0; row < num_rows; row++) {
                for (int j = 0; j < 6; j++) products[j] += by_pose[row][i] * by_pose[row][j];
                for (int j = 0; j < 3; j++) shared[j] += by_pose[row][i] * by_point[row][j];
                sum += by_pose[row][i] * residual[row];
            }
            for (int j = 0; j < 6; j++) camera[i * size + j] += products[j];
            for (int j = 0; j < 3; j++) blocks[3 * i + j] = shared[j];
            gradient[i] += sum;
            for (int lens = 0; lens < num_lens; lens++) {
                const double slope = by_pose[0][i] * by_lens[lens][0] + by_pose[1][i] * by_lens[lens][1];
                cameras[(6 * pose + i) * size + first_lens + lens] += slope;
                cameras[(first_lens + lens) * size + 6 * pose + i] += slope;
            }
        }
        blocks += 18;
    }
}

/* The inverse of a symmetric 3x3 block whose diagonal is scaled by 1 + damping and lifted off zero. */
INLINE void inverted(const double *block, double damping, double *restrict inverse) {
    const double largest = fmax(block[0], fmax(block[4], block[8])), lift = 1e-9 * largest + 1e-12;
    const double a = block[0] + (block[0] * damping + lift), b = block[1], c = block[2];
    const double d = block[4] + (block[4] * damping + lift), e = block[5];
    const double f = block[8] + (block[8] * damping + lift);
    /* By L D L^T, which keeps more digits of a point seen from far away than cofactors do. */
    const double l10 = b / a, l20 = c / a, d1 = d - l10 * b, l21 = (e - l10 * c) / d1;
    const double d2 = f - l20 * c - l21 * l21 * d1;
    const double i0 = 1.0 / a, i1 = 1.0 / d1, i2 = 1.0 / d2, m20 = l10 * l21 - l20;
    inverse[8] = i2;
    inverse[5] = inverse[7] = -l21 * i2;
    inverse[4] = i1 + l21 * l21 * i2;
    inverse[2] = inverse[6] = m20 * i2;
    inverse[1] = inverse[3] = -l10 * i1 - l21 * m20 * i2;
    inverse[0] = i0 + l10 * l10 * i1 + m20 * m20 * i2;
}

/* Takes the points out: system (C, C) and gradient (C,) come in as those of the cameras; writes inverse (L, 3, 3).
 * rows (B,) and starts (L + 1,) list the blocks of every point, poses ascending; block_poses (B,) is in the order of
 * the blocks. */
EXPORTED void lightvo_window_reduce(int64_t num_free, int64_t num_lens, int64_t num_points, const int64_t *rows,
                                    const int64_t *starts, const int64_t *block_poses, const double *blocks,
                                    const double *lens_points, const double *points, const double *point_gradients,
                                    double damping, double *restrict inverse, double *restrict system,
                                    double *restrict gradient) {
    const int64_t size = 6 * num_free + num_lens, first_lens = 6 * num_free;
    for (int64_t point = 0; point < num_points; point++) {
        double *V = inverse + 9 * point;
        const double *g = point_gradients + 3 * point;
        inverted(points + 9 * point, damping, V);
        for (int64_t k = starts[point]; k < starts[point + 1]; k++) {
            const double *B = blocks + 18 * rows[k];
            const int64_t pose = 6 * block_poses[rows[k]];
            double Y[6][3];
            for (int i = 0; i < 6; i++) {
                for (int j = 0; j < 3; j++)
                    Y[i][j] = B[3 * i] * V[j] + B[3 * i + 1] * V[3 + j] + B[3 * i + 2] * V[6 + j];
                gradient[pose + i] -= Y[i][0] * g[0] + Y[i][1] * g[1] + Y[i][2] * g[2];
            }
            for (int64_t l = starts[point]; l <= k; l++) {
                const double *other = blocks + 18 * rows[l];
                double *out = system + pose * size + 6 * block_poses[rows[l]];
                for (int i = 0; i < 6; i++)
                    for (int j = 0; j < 6; j++)
                        out[i * size + j] -=
                            Y[i][0] * other[3 * j] + Y[i][1] * other[3 * j + 1] + Y[i][2] * other[3 * j + 2];
            }
            for (int64_t lens = 0; lens < num_lens; lens++) {
                const double *c = lens_points + 3 * (lens * num_points + point);
                for (int i = 0; i < 6; i++)
                    system[(first_lens + lens) * size + pose + i] -= Y[i][0] * c[0] + Y[i][1] * c[1] + Y[i][2] * c[2];
            }
        }
        for (int64_t lens = 0; lens < num_lens; lens++) {
            const double *c = lens_points + 3 * (lens * num_points + point);
            double y[3];
            for (int j = 0; j < 3; j++) y[j] = c[0] * V[j] + c[1] * V[3 + j] + c[2] * V[6 + j];
            gradient[first_lens + lens] -= y[0] * g[0] + y[1] * g[1] + y[2] * g[2];
            for (int64_t other = 0; other <= lens; other++) {
                const double *d = lens_points + 3 * (other * num_points + point);
                system[(first_lens + lens) * size + first_lens + other] -= y[0] * d[0] + y[1] * d[1] + y[2] * d[2];
            }
        }
    }
    for (int64_t i = 0; i < size; i++)
        for (int64_t j = 0; j < i; j++) system[j * size + i] = system[i * size + j];
}

/* Steps (L, 3) of the points that belong to a step (C,) of the cameras. */
EXPORTED void lightvo_window_points(int64_t num_free, int64_t num_lens, int64_t num_points, const int64_t *rows,
                                    const int64_t *starts, const int64_t *block_poses, const double *blocks,
                                    const double *lens_points, const double *point_gradients, const double *inverse,
                                    const double *camera_step, double *restrict steps) {
    for (int64_t point = 0; point < num_points; point++) {
        const double *V = inverse + 9 * point, *g = point_gradients + 3 * point;
        double r[3] = {g[0], g[1], g[2]};
        for (int64_t k = starts[point]; k < starts[point + 1]; k++) {
            const double *B = blocks + 18 * rows[k], *step = camera_step + 6 * block_poses[rows[k]];
            for (int i = 0; i < 6; i++)
                for (int j = 0; j < 3; j++) r[j] += B[3 * i + j] * step[i];
        }
        for (int64_t lens = 0; lens < num_lens; lens++)
            for (int j = 0; j < 3; j++)
                r[j] += lens_points[3 * (lens * num_points + point) + j] * camera_step[6 * num_free + lens];
        for (int i = 0; i < 3; i++)
            steps[3 * point + i] = -(V[3 * i] * r[0] + V[3 * i + 1] * r[1] + V[3 * i + 2] * r[2]);
    }
}

/* --- small matrices ----------------------------------------------------------------------------------------------- */

/* R (3, 3) of a rotation vector, rad; by way of the quaternion. */
INLINE void exp_so3(const double *phi, double *R) {
    const double angle = sqrt(phi[0] * phi[0] + phi[1] * phi[1] + phi[2] * phi[2]), squared = angle * angle;
    const double scale = angle <= 1e-3 ? 0.5 - squared / 48 + squared * squared / 3840 : sin(angle / 2) / angle;
    const double x = scale * phi[0], y = scale * phi[1], z = scale * phi[2], w = cos(angle / 2);
    R[0] = x * x - y * y - z * z + w * w, R[1] = 2 * (x * y - z * w), R[2] = 2 * (x * z + y * w);
    R[3] = 2 * (x * y + z * w), R[4] = -x * x + y * y - z * z + w * w, R[5] = 2 * (y * z - x * w);
    R[6] = 2 * (x * z - y * w), R[7] = 2 * (y * z + x * w), R[8] = -x * x - y * y + z * z + w * w;
}

/* T (4, 4) times exp of a twist (rho, phi). */
INLINE void moved_pose(const double *T, const double *xi, double *out) {
    const double *rho = xi, *phi = xi + 3;
    const double squared = phi[0] * phi[0] + phi[1] * phi[1] + phi[2] * phi[2], angle = sqrt(squared);
    const double first = squared < 1e-8 ? 1.0 / 2 : (1 - cos(angle)) / squared;
    const double second = squared < 1e-8 ? 1.0 / 6 : (angle - sin(angle)) / (squared * angle);
    const double c[3] = {phi[1] * rho[2] - phi[2] * rho[1], phi[2] * rho[0] - phi[0] * rho[2],
                         phi[0] * rho[1] - phi[1] * rho[0]};
    const double t[3] = {rho[0] + first * c[0] + second * (phi[1] * c[2] - phi[2] * c[1]),
                         rho[1] + first * c[1] + second * (phi[2] * c[0] - phi[0] * c[2]),
                         rho[2] + first * c[2] + second * (phi[0] * c[1] - phi[1] * c[0])};
    double R[9];
    exp_so3(phi, R);
    for (int i = 0; i < 3; i++) {
        for (int j = 0; j < 3; j++)
            out[4 * i + j] = T[4 * i] * R[j] + T[4 * i + 1] * R[3 + j] + T[4 * i + 2] * R[6 + j];
        out[4 * i + 3] = T[4 * i] * t[0] + T[4 * i + 1] * t[1] + T[4 * i + 2] * t[2] + T[4 * i + 3];
    }
    out[12] = out[13] = out[14] = 0.0, out[15] = 1.0;
}

/* x (size,) with H x = b by Cholesky; 0 where H (size, size), of 6 rows at most, is hardly positive definite. */
INLINE int solved(int size, const double *H, const double *b, double *x) {
    double L[36], smallest = INFINITY, largest = 0.0;
    for (int i = 0; i < size; i++)
        for (int j = 0; j <= i; j++) {
            double sum = H[size * i + j];
            for (int k = 0; k < j; k++) sum -= L[6 * i + k] * L[6 * j + k];
            if (i != j) {
                L[6 * i + j] = sum / L[6 * j + j];
                continue;
            }
            if (!(sum > 0)) return 0;
            L[6 * i + i] = sqrt(sum);
            smallest = fmin(smallest, L[6 * i + i]), largest = fmax(largest, L[6 * i + i]);
        }
    if (!(smallest >= 1e-7 * largest) || !isfinite(largest)) return 0;
    for (int i = 0; i < size; i++) {
        x[i] = b[i];
        for (int k = 0; k < i; k++) x[i] -= L[6 * i + k] * x[k];
        x[i] /= L[6 * i + i];
    }
    for (int i = size - 1; i >= 0; i--) {
        for (int k = i + 1; k < size; k++) x[i] -= L[6 * k + i] * x[k];
        x[i] /= L[6 * i + i];
    }
    return 1;
}

/* The value that `rank` of (num,) do not exceed, in place: everything before it is no larger then. */
INLINE double selected(double *values, int64_t num, int64_t rank) {
    int64_t low = 0, high = num - 1;
    while (low < high) {
        const double pivot = values[(low + high) / 2];
        int64_t i = low, j = high;
        while (i <= j) {
            while (values[i] < pivot) i++;
            while (pivot < values[j]) j--;
            if (i > j) break;
            const double swapped = values[i];
            values[i++] = values[j], values[j--] = swapped;
        }
        if (rank <= j) high = j;
        else if (rank >= i) low = i;
        else break;
    }
    return values[rank];
}

/* Of (num,) values, at least one, in place. */
INLINE double median_of(double *values, int64_t num) {
    const double upper = selected(values, num, num / 2);
    if (num % 2) return upper;
    double lower = values[0];
    for (int64_t i = 1; i < num / 2; i++) lower = fmax(lower, values[i]);
    return (lower + upper) / 2;
}

/* --- two views ---------------------------------------------------------------------------------------------------- */

/* seen (6, M): distance, inverse gradient, four rows of lines; of matches x0, x1 (3, M), whose last rows are ones. */
INLINE void matches_seen(int64_t num, const double *restrict x0, const double *restrict x1, const double *restrict E,
                         double *restrict seen) {
    double *restrict distance = seen, *restrict inverse_gradient = seen + num, *restrict lines = seen + 2 * num;
    const double *restrict ax = x0, *restrict ay = x0 + num, *restrict bx = x1, *restrict by = x1 + num;
    for (int64_t m = 0; m < num; m++) {
        const double l0 = E[0] * bx[m] + E[1] * by[m] + E[2], l1 = E[3] * bx[m] + E[4] * by[m] + E[5];
        const double l2 = E[6] * bx[m] + E[7] * by[m] + E[8];
        const double r0 = E[0] * ax[m] + E[3] * ay[m] + E[6], r1 = E[1] * ax[m] + E[4] * ay[m] + E[7];
        const double squared = l0 * l0 + l1 * l1 + r0 * r0 + r1 * r1;
        const double inverse = 1.0 / sqrt(squared > 1e-24 ? squared : 1e-24);
        distance[m] = (ax[m] * l0 + ay[m] * l1 + l2) * inverse;
        inverse_gradient[m] = inverse;
        lines[m] = l0, lines[num + m] = l1, lines[2 * num + m] = r0, lines[3 * num + m] = r1;
    }
}

EXPORTED void lightvo_matches_seen(int64_t num, const double *x0, const double *x1, const double *E, double *seen) {
    matches_seen(num, x0, x1, E, seen);
}

#define CHUNK 64

/* Out (5 5 + 5 + 4): H, gradient and the four sums, from the five derivatives of E, steps (5, 9), by what moves it. */
INLINE void matches_system(int64_t num, const double *restrict x0, const double *restrict x1,
                           const double *restrict steps, const double *restrict seen, double scale, double cutoff,
                           double *restrict out) {
    const double *restrict distance = seen, *restrict inverse_gradient = seen + num, *restrict lines = seen + 2 * num;
    double *restrict H = out, *restrict gradient = out + 25, *restrict sums = out + 30;
    double jacobian[5][CHUNK], weighted[CHUNK], products[15] = {0}, slopes[5] = {0}, total[4] = {0};
    const double narrow = 1.0 / scale;
    for (int64_t start = 0; start < num; start += CHUNK) {
        const int count = (int)(num - start < CHUNK ? num - start : CHUNK);
        const double *restrict ax = x0 + start, *restrict ay = x0 + num + start;
        const double *restrict bx = x1 + start, *restrict by = x1 + num + start;
        const double *restrict d = distance + start, *restrict g = inverse_gradient + start;
        const double *restrict l0 = lines + start, *restrict l1 = lines + num + start;
        const double *restrict r0 = lines + 2 * num + start, *restrict r1 = lines + 3 * num + start;
        double sum0 = 0.0, sum1 = 0.0, sum2 = 0.0, sum3 = 0.0;
        for (int m = 0; m < count; m++) {
            const double ratio = d[m] * narrow, inside = fabs(d[m]) < cutoff ? 1.0 : 0.0;
            const double root = inside / (1.0 + ratio * ratio), weight = root * root;
            const double off = d[m] * g[m], factor = root * g[m];
            const double y0 = ax[m] - off * l0[m], y1 = ay[m] - off * l1[m], z0 = off * r0[m], z1 = off * r1[m];
            weighted[m] = root * d[m];
            for (int k = 0; k < 5; k++) {
                const double *D = steps + 9 * k;
                const double p0 = D[0] * bx[m] + D[1] * by[m] + D[2], p1 = D[3] * bx[m] + D[4] * by[m] + D[5];
                const double p2 = D[6] * bx[m] + D[7] * by[m] + D[8];
                const double q0 = D[0] * ax[m] + D[3] * ay[m] + D[6], q1 = D[1] * ax[m] + D[4] * ay[m] + D[7];
                jacobian[k][m] = (y0 * p0 + y1 * p1 + p2 - z0 * q0 - z1 * q1) * factor;
            }
            sum0 += weight, sum1 += weight * root;
            sum2 += weighted[m] * weighted[m], sum3 += weight * d[m] * weight * d[m];
        }
        total[0] += sum0, total[1] += sum1, total[2] += sum2, total[3] += sum3;
        int place = 0;
        for (int i = 0; i < 5; i++) {
            for (int j = 0; j <= i; j++) {
                double sum = 0.0;
                for (int m = 0; m < count; m++) sum += jacobian[i][m] * jacobian[j][m];
                products[place++] += sum;
            }
            double sum = 0.0;
            for (int m = 0; m < count; m++) sum += jacobian[i][m] * weighted[m];
            slopes[i] += sum;
        }
    }
    int place = 0;
    for (int i = 0; i < 5; i++) {
        for (int j = 0; j <= i; j++) H[5 * i + j] = H[5 * j + i] = products[place++];
        gradient[i] = slopes[i];
    }
    sums[0] = total[0], sums[1] = 4.0 * total[1] - 3.0 * total[0], sums[2] = total[2], sums[3] = total[3];
}

EXPORTED void lightvo_matches_system(int64_t num, const double *x0, const double *x1, const double *steps,
                                     const double *seen, double scale, double cutoff, double *out) {
    matches_system(num, x0, x1, steps, seen, scale, cutoff, out);
}

/* basis (2, 3): unit vectors across a unit vector. */
INLINE void tangents(const double *direction, double *basis) {
    const double x = direction[0], y = direction[1], z = direction[2], sign = copysign(1.0, z);
    const double a = -1.0 / (sign + z), b = x * y * a;
    basis[0] = 1.0 + sign * x * x * a, basis[1] = sign * b, basis[2] = -sign * x;
    basis[3] = b, basis[4] = sign + y * y * a, basis[5] = -y;
}

INLINE void essential(const double *T, double *E) {
    for (int j = 0; j < 3; j++) {
        E[j] = T[7] * T[8 + j] - T[11] * T[4 + j];
        E[3 + j] = T[11] * T[j] - T[3] * T[8 + j];
        E[6 + j] = T[3] * T[4 + j] - T[7] * T[j];
    }
}

/* steps (5, 9): derivatives of E by steps along the basis, and by the right perturbation of the rotation. */
INLINE void essential_steps(const double *T, const double *E, const double *basis, double *steps) {
    for (int k = 0; k < 2; k++)
        for (int i = 0; i < 3; i++) {
            const double *v = basis + 3 * k, *R = T + 4 * i;
            double *out = steps + 9 * k + 3 * i;
            out[0] = R[1] * v[2] - R[2] * v[1], out[1] = R[2] * v[0] - R[0] * v[2], out[2] = R[0] * v[1] - R[1] * v[0];
        }
    for (int i = 0; i < 3; i++) {
        const double *row = E + 3 * i;
        double *out = steps + 18 + 3 * i;
        out[0] = 0.0, out[1] = row[2], out[2] = -row[1];
        out[9] = -row[2], out[10] = 0.0, out[11] = row[0];
        out[18] = row[1], out[19] = -row[0], out[20] = 0.0;
    }
}

/* The refinement of `_refine_to_noise`, in place on T (4, 4), whose translation has unit length, with work (7, M).
 * limits: looks at the noise, steps, the distances NEAR and LAST_STEP. Returns the noise, 0 where too few matches lie
 * inside, -1 where the system is hardly definite, which leaves T as it was. */
EXPORTED double lightvo_matches_refine(int64_t num, const double *x0, const double *x1, double threshold,
                                       const double *limits, double *T_inout, double *work) {
    double T[16], E[9], basis[6], steps[45], out[34], step[5], *seen = work, *inside = work + 6 * num;
    double gate = threshold, sigma = 0.0;
    int num_looks = 0, is_near = 1, is_settled = 0;
    const int max_looks = (int)limits[0], max_steps = (int)limits[1];
    for (int i = 0; i < 16; i++) T[i] = T_inout[i];
    for (int iteration = 0; iteration < max_steps; iteration++) {
        essential(T, E);
        matches_seen(num, x0, x1, E, seen);
        if (is_near && num_looks < max_looks) {
            int64_t count = 0;
            for (int64_t m = 0; m < num; m++)
                if (fabs(seen[m]) < gate) inside[count++] = fabs(seen[m]);
            if (count < 6) break;
            const double before = sigma;
            sigma = fmax(1.4826 * median_of(inside, count), 1e-3 * threshold);
            gate = 3 * sigma, num_looks++;
            is_settled = num_looks == max_looks || fabs(sigma - before) < 0.02 * sigma;
        }
        double direction[3];
        for (int j = 0; j < 3; j++) direction[j] = T[3] * T[j] + T[7] * T[4 + j] + T[11] * T[8 + j];
        tangents(direction, basis);
        essential_steps(T, E, basis, steps);
        matches_system(num, x0, x1, steps, seen, 2.5 * sigma, 6 * sigma, out);
        if (!solved(5, out, out + 25, step)) return -1.0;
        const double weights = out[30], curvatures = out[31];
        const double far = fmin(curvatures > 0 ? weights / curvatures : 2.0, 2.0);
        double decrease = 0.0, R[9], moved[3], length = 0.0;
        for (int i = 0; i < 5; i++) step[i] *= -far, decrease += step[i] * out[25 + i];
        const double across[3] = {step[0] * basis[0] + step[1] * basis[3], step[0] * basis[1] + step[1] * basis[4],
                                  step[0] * basis[2] + step[1] * basis[5]};
        exp_so3(step + 2, R);
        for (int i = 0; i < 3; i++) {
            double *row = T + 4 * i;
            const double turned[3] = {row[0] * R[0] + row[1] * R[3] + row[2] * R[6],
                                      row[0] * R[1] + row[1] * R[4] + row[2] * R[7],
                                      row[0] * R[2] + row[1] * R[5] + row[2] * R[8]};
            moved[i] = row[3] + row[0] * across[0] + row[1] * across[1] + row[2] * across[2];
            length += moved[i] * moved[i];
            row[0] = turned[0], row[1] = turned[1], row[2] = turned[2];
        }
        for (int i = 0; i < 3; i++) T[4 * i + 3] = moved[i] / sqrt(length);
        const double far_off = sqrt(fabs(decrease)) / sigma;
        is_near = far_off < limits[2];
        if (is_settled && far_off < limits[3]) break;
    }
    for (int i = 0; i < 16; i++) T_inout[i] = T[i];
    return sigma;
}

/* counts (2, 2): points before both cameras with each of two rotations (2, 3, 3), with t and with -t. */
EXPORTED void lightvo_matches_in_front(int64_t num, const double *restrict x0, const double *restrict x1,
                                       const double *restrict rotations, const double *restrict t,
                                       int64_t *restrict counts) {
    for (int k = 0; k < 2; k++) {
        const double *R = rotations + 9 * k;
        double before = 0.0, behind = 0.0;
        for (int64_t m = 0; m < num; m++) {
            const double ax = x0[m], ay = x0[num + m], bx = x1[m], by = x1[num + m];
            const double rx = R[0] * bx + R[1] * by + R[2], ry = R[3] * bx + R[4] * by + R[5];
            const double rz = R[6] * bx + R[7] * by + R[8];
            const double a = ax * ax + ay * ay + 1.0, b = rx * ax + ry * ay + rz, c = bx * bx + by * by + 1.0;
            const double d = t[0] * ax + t[1] * ay + t[2], e = t[0] * rx + t[1] * ry + t[2] * rz;
            const double sign0 = c * d - b * e, sign1 = b * d - a * e;
            before += sign0 > 0 && sign1 > 0 ? 1.0 : 0.0;
            behind += sign0 < 0 && sign1 < 0 ? 1.0 : 0.0;
        }
        counts[2 * k] = (int64_t)before, counts[2 * k + 1] = (int64_t)behind;
    }
}

/* --- one view of landmarks ---------------------------------------------------------------------------------------- */

/* Sum of log(1 + squared / kernel squared) at a pose (4, 4) over landmarks (3, N) and their rays (2, N). */
INLINE double landmarks_cost(int64_t num, const double *points, const double *rays, const double *T, double focal_px,
                             double kernel_px) {
    const double narrow = 1.0 / (kernel_px * kernel_px);
    double cost = 0.0;
    for (int64_t n = 0; n < num; n++) {
        const double x = points[n] - T[3], y = points[num + n] - T[7], z = points[2 * num + n] - T[11];
        const double depth = T[2] * x + T[6] * y + T[10] * z;
        const double inverse = 1.0 / (fabs(depth) < NEAREST ? NEAREST : depth);
        const double u = ((T[0] * x + T[4] * y + T[8] * z) * inverse - rays[n]) * focal_px;
        const double v = ((T[1] * x + T[5] * y + T[9] * z) * inverse - rays[num + n]) * focal_px;
        cost += log1p((depth > 0 ? u * u + v * v : 1e6) * narrow);
    }
    return cost;
}

/* H (6, 6) and gradient (6,) of the residuals under a Cauchy kernel; landmarks behind the camera count for nothing. */
INLINE void landmarks_system(int64_t num, const double *restrict points, const double *restrict rays,
                             const double *restrict T, double focal_px, double kernel_px, double *restrict H,
                             double *restrict gradient) {
    double by_u[6][CHUNK], by_v[6][CHUNK], off_u[CHUNK], off_v[CHUNK], weight[CHUNK];
    double products[21] = {0}, slopes[6] = {0};
    const double narrow = 1.0 / (kernel_px * kernel_px);
    for (int64_t start = 0; start < num; start += CHUNK) {
        const int count = (int)(num - start < CHUNK ? num - start : CHUNK);
        const double *restrict xs = points + start, *restrict ys = xs + num, *restrict zs = ys + num;
        const double *restrict rays_u = rays + start, *restrict rays_v = rays_u + num;
        for (int m = 0; m < count; m++) {
            const double x = xs[m] - T[3], y = ys[m] - T[7], z = zs[m] - T[11];
            const double depth = T[2] * x + T[6] * y + T[10] * z;
            const double inverse = 1.0 / (fabs(depth) < NEAREST ? NEAREST : depth), near = inverse * focal_px;
            const double u = (T[0] * x + T[4] * y + T[8] * z) * inverse, v = (T[1] * x + T[5] * y + T[9] * z) * inverse;
            off_u[m] = (u - rays_u[m]) * focal_px, off_v[m] = (v - rays_v[m]) * focal_px;
            weight[m] = depth > 0 ? 1.0 / (1.0 + (off_u[m] * off_u[m] + off_v[m] * off_v[m]) * narrow) : 0.0;
            by_u[0][m] = -near, by_u[1][m] = 0.0, by_u[2][m] = u * near;
            by_u[3][m] = focal_px * u * v, by_u[4][m] = -focal_px - focal_px * u * u, by_u[5][m] = focal_px * v;
            by_v[0][m] = 0.0, by_v[1][m] = -near, by_v[2][m] = v * near;
            by_v[3][m] = focal_px + focal_px * v * v, by_v[4][m] = -focal_px * u * v, by_v[5][m] = -focal_px * u;
        }
        int place = 0;
        for (int i = 0; i < 6; i++) {
            double row_u[CHUNK], row_v[CHUNK], slope = 0.0;
            for (int m = 0; m < count; m++) {
                row_u[m] = by_u[i][m] * weight[m], row_v[m] = by_v[i][m] * weight[m];
                slope += row_u[m] * off_u[m] + row_v[m] * off_v[m];
            }
            slopes[i] += slope;
            for (int j = 0; j <= i; j++) {
                double sum = 0.0;
                for (int m = 0; m < count; m++) sum += row_u[m] * by_u[j][m] + row_v[m] * by_v[j][m];
                products[place++] += sum;
            }
        }
    }
    int place = 0;
    for (int i = 0; i < 6; i++) {
        for (int j = 0; j <= i; j++) H[6 * i + j] = H[6 * j + i] = products[place++];
        gradient[i] = slopes[i];
    }
}

/* The loop of `refine_absolute_pose`, in place on T (4, 4); 0 where a system is hardly definite, which leaves T as it
 * was. */
EXPORTED int64_t lightvo_landmarks_refine(int64_t num, const double *points, const double *rays, double focal_px,
                                          double kernel_px, int64_t max_iterations, double *T_inout) {
    double T[16], candidate[16], H[36], gradient[6], damped[36], step[6], damping = 1e-4;
    for (int i = 0; i < 16; i++) T[i] = T_inout[i];
    double cost = landmarks_cost(num, points, rays, T, focal_px, kernel_px);
    landmarks_system(num, points, rays, T, focal_px, kernel_px, H, gradient);
    for (int64_t iteration = 0; iteration < max_iterations; iteration++) {
        for (int i = 0; i < 36; i++) damped[i] = H[i] * (i % 7 ? 1.0 : 1.0 + damping);
        if (!solved(6, damped, gradient, step)) return 0;
        for (int i = 0; i < 6; i++) step[i] = -step[i];
        moved_pose(T, step, candidate);
        const double candidate_cost = landmarks_cost(num, points, rays, candidate, focal_px, kernel_px);
        if (candidate_cost < cost) {
            const int is_converged = cost - candidate_cost < 1e-7 * cost;
            for (int i = 0; i < 16; i++) T[i] = candidate[i];
            cost = candidate_cost, damping = fmax(damping / 10, 1e-9);
            if (is_converged) break;
            landmarks_system(num, points, rays, T, focal_px, kernel_px, H, gradient);
        } else {
            damping *= 10;
            if (damping > 1e6) break;
        }
    }
    for (int i = 0; i < 16; i++) T_inout[i] = T[i];
    return 1;
}
