/* Keep a bank of registers alive across a wait and a system call, then say what has become of them.
 *
 *   void hold_sse/avx/avx512(const struct bank *in, struct bank *out, long spins, const struct call *call)
 *
 * Load every register from `in`, spin, make the system call (unless `call` is NULL), store every register to
 * `out`. The layout is that of struct bank and struct call in registers.c. */

#define MASKS       2048
#define GENERAL     2112
#define X87         2160
#define MXCSR       2288
#define CONTROL     2292
#define RESULT      2296

        .text

        .macro  save_and_load_common
        push    %rbx
        push    %rbp
        push    %r12
        push    %r13
        push    %r14
        push    %r15
        sub     $40, %rsp
        mov     %rsi, 0(%rsp)           /* where to store */
        stmxcsr 16(%rsp)
        fninit
        fldcw   CONTROL(%rdi)
        .irp    index, 0, 1, 2, 3, 4, 5, 6, 7
        fldt    X87 + 16 * \index(%rdi)
        .endr
        ldmxcsr MXCSR(%rdi)
        mov     GENERAL + 0(%rdi), %rbx
        mov     GENERAL + 8(%rdi), %rbp
        mov     GENERAL + 16(%rdi), %r12
        mov     GENERAL + 24(%rdi), %r13
        mov     GENERAL + 32(%rdi), %r14
        mov     GENERAL + 40(%rdi), %r15
        .endm

        .macro  wait_and_call
        xor     %eax, %eax
        test    %rdx, %rdx
        jz      2f
1:      pause
        dec     %rdx
        jnz     1b
2:      test    %rcx, %rcx
        jz      3f
        mov     %rcx, %r11
        mov     0(%r11), %rax
        mov     8(%r11), %rdi
        mov     16(%r11), %rsi
        mov     24(%r11), %rdx
        mov     32(%r11), %r10
        syscall
3:      mov     0(%rsp), %rsi
        mov     %rax, RESULT(%rsi)
        .endm

        .macro  store_common_and_return
        mov     %rbx, GENERAL + 0(%rsi)
        mov     %rbp, GENERAL + 8(%rsi)
        mov     %r12, GENERAL + 16(%rsi)
        mov     %r13, GENERAL + 24(%rsi)
        mov     %r14, GENERAL + 32(%rsi)
        mov     %r15, GENERAL + 40(%rsi)
        stmxcsr MXCSR(%rsi)
        fnstcw  CONTROL(%rsi)
        .irp    index, 7, 6, 5, 4, 3, 2, 1, 0
        fstpt   X87 + 16 * \index(%rsi)
        .endr
        fninit
        ldmxcsr 16(%rsp)
        add     $40, %rsp
        pop     %r15
        pop     %r14
        pop     %r13
        pop     %r12
        pop     %rbp
        pop     %rbx
        ret
        .endm

        .globl  hold_sse
        .type   hold_sse, @function
hold_sse:
        save_and_load_common
        .irp    index, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
        movups  64 * \index(%rdi), %xmm\index
        .endr
        wait_and_call
        .irp    index, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
        movups  %xmm\index, 64 * \index(%rsi)
        .endr
        store_common_and_return

        .globl  hold_avx
        .type   hold_avx, @function
hold_avx:
        save_and_load_common
        .irp    index, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
        vmovups 64 * \index(%rdi), %ymm\index
        .endr
        wait_and_call
        .irp    index, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
        vmovups %ymm\index, 64 * \index(%rsi)
        .endr
        vzeroupper
        store_common_and_return

        .globl  hold_avx512
        .type   hold_avx512, @function
hold_avx512:
        save_and_load_common
        .irp    index, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31
        vmovups 64 * \index(%rdi), %zmm\index
        .endr
        .irp    index, 0, 1, 2, 3, 4, 5, 6, 7
        kmovq   MASKS + 8 * \index(%rdi), %k\index
        .endr
        wait_and_call
        .irp    index, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31
        vmovups %zmm\index, 64 * \index(%rsi)
        .endr
        .irp    index, 0, 1, 2, 3, 4, 5, 6, 7
        kmovq   %k\index, MASKS + 8 * \index(%rsi)
        .endr
        vzeroupper
        store_common_and_return

        .section .note.GNU-stack, "", @progbits
